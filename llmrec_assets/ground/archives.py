"""Takes named files out of a zip that nobody vouches for.

What belongs here: what an archive may not do to the machine that opens it. What does not: which
archive, where it comes from and which checksums it should have (``sources``).
"""

from __future__ import annotations

import errno
import hashlib
import lzma
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from llmrec_assets.ground.errors import DataError

#: The largest official file has 24.6 MB.
MAX_FILE_BYTES = 64 * 2**20
#: Rating data deflates about fivefold; beyond a megabyte, more than this is a bomb.
MAX_RATIO = 100
_MAX_ENTRIES = 10_000
_CHUNK = 2**20

# Everything ``zipfile`` and its decompressors raise on damaged input.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
    OSError,
)
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def contains(zip_path: Path, names: Sequence[str]) -> bool:
    """Whether the zip has a file of each of these names, in whatever folder."""
    with _open(zip_path) as archive:
        return set(names) <= _wanted(archive, zip_path, names).keys()


def unpack(
    zip_path: Path, required: Sequence[str], optional: Sequence[str], destination: Path
) -> Path:
    """Extracts the named files, without their folders, into ``destination`` and returns it.

    All or nothing: they are written aside, checked against the archive's CRCs and moved by one
    rename. A ``destination`` that already holds exactly these contents is left as it is.

    Raises DataError when the archive is damaged, lacks a required file, or holds what no data set
    needs: absolute or climbing paths, links, encryption, sizes out of proportion. Raises OSError
    when ``destination`` cannot be written.
    """
    with _open(zip_path) as archive:
        wanted = _wanted(archive, zip_path, (*required, *optional))
        if missing := [name for name in required if name not in wanted]:
            raise DataError(
                f"{zip_path} has no {', '.join(missing)}. Use the archive of the data set asked "
                f"for: it must hold {', '.join(required)}."
            )
        if _holds(destination, wanted):
            return destination
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=destination.parent))
        try:
            for name, info in wanted.items():
                _extract(archive, info, aside / name)
            if destination.exists():  # an interrupted or altered copy
                shutil.rmtree(destination)
            aside.chmod(0o755)  # mkdtemp's 0700 would shut out whoever shares the cache
            aside.rename(destination)
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
                raise  # the machine's fault, not the archive's
            raise _damaged(zip_path, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return destination


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(zip_path: Path, error: Exception) -> DataError:
    return DataError(
        f"{zip_path} cannot be unpacked ({type(error).__name__}: {error}): it is truncated, "
        "damaged or no zip. Delete it and retry, or download it again."
    )


def _open(zip_path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(zip_path)
    except _DAMAGE as error:
        raise _damaged(zip_path, error) from error


def _wanted(
    archive: zipfile.ZipFile, zip_path: Path, names: Sequence[str]
) -> dict[str, zipfile.ZipInfo]:
    """Entries by base name; refuses the whole archive for one hostile entry."""

    def refuse(info: zipfile.ZipInfo, what: str) -> DataError:
        return DataError(
            f"{zip_path}: entry {info.filename!r} {what}. Use the data set's official archive, or "
            "unpack this one yourself and set LLMREC_DATA_DIR to the directory."
        )

    if len(archive.infolist()) > _MAX_ENTRIES:
        raise refuse(archive.infolist()[_MAX_ENTRIES], f"is one of more than {_MAX_ENTRIES:,}")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # ``orig_filename``: zipfile cuts names at NUL and turns separators before we see them.
        path, windows = PurePosixPath(info.orig_filename), PureWindowsPath(info.orig_filename)
        if not info.filename or "\0" in info.orig_filename:
            raise refuse(info, "has no usable name")
        if path.is_absolute() or windows.drive or windows.root:
            raise refuse(info, "has an absolute path")
        if ".." in path.parts or ".." in windows.parts:
            raise refuse(info, "climbs out of the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise refuse(info, "is a link")
        # macOS puts a shadow of every file into a folder of its own.
        if info.is_dir() or path.name not in names or "__MACOSX" in path.parts:
            continue
        if info.flag_bits & 0x1:
            raise refuse(info, "is encrypted")
        if info.file_size > MAX_FILE_BYTES:
            raise refuse(info, f"has {info.file_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        if info.file_size > max(_CHUNK, MAX_RATIO * info.compress_size):
            raise refuse(info, f"grows more than {MAX_RATIO}-fold when unpacked")
        if path.name in found:
            raise refuse(info, f"and {found[path.name].filename!r} both claim to be {path.name}")
        found[path.name] = info
    return found


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    # ``read`` stops at the declared size, which was checked, and fails where the CRC differs.
    written = 0
    with archive.open(info) as source, target.open("xb") as sink:
        while chunk := source.read(_CHUNK):
            written += sink.write(chunk)
    if written != info.file_size:
        raise EOFError(f"{info.filename} ends after {written:,} of {info.file_size:,} bytes")


def _holds(directory: Path, wanted: dict[str, zipfile.ZipInfo]) -> bool:
    if not directory.is_dir() or {path.name for path in directory.iterdir()} != wanted.keys():
        return False
    return all(zlib.crc32((directory / name).read_bytes()) == i.CRC for name, i in wanted.items())
