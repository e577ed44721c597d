"""Finds a data set's files: the sample, a place the user names, an earlier download, GroupLens.

What belongs here: where files come from, and whether they are the official ones. What does not:
opening an untrusted zip (``archives``), what stands in the files (``movielens``). MovieLens may be
used for research and not be redistributed, so nothing here puts its files into the project.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests
from filelock import FileLock

from llmrec_assets.ground.archives import contains, sha256_of, unpack
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.formats import FORMATS, DatasetFormat
from llmrec_assets.ground.redaction import without_secrets

Log = Callable[[str], None]


@dataclass(frozen=True)
class OfficialArchive:
    """GroupLens' archive of one data set, with what it must look like."""

    url: str
    md5: str
    sha256: str | None
    size: int | None
    """Bytes of the archive where known."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 by file name."""


OFFICIAL: dict[str, OfficialArchive] = {
    "ml-100k": OfficialArchive(
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        md5="0e33842e24a9c977be4e0107933c0723",
        sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        size=4_924_029,
        files={
            "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
            "u.genre": "9757e0d3e6b298159a80dd48eaf938114690e911e39af97a76949ef1663610bb",
            "u.occupation": "cd5fbec9afe345d993a62fc7817df1a4a9079c4feb267b3118763b8fd942137d",
        },
    ),
    "ml-1m": OfficialArchive(
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        md5="c4d9eecfca2ab87c1945afe126590906",
        sha256=None,
        size=None,
        files={
            "ratings.dat": "506d64ca44484487c11dc2d9a28de5c54948213e6b96285e298afe28d6ea4e0f",
            "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
            "users.dat": "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3",
        },
    ),
}

#: Times a download is taken up again, and the wait before each (doubling).
ATTEMPTS = 5
RETRY_WAIT_S = 1.0
_TIMEOUT_S = (10, 60)
_MAX_ARCHIVE_BYTES = 64 * 2**20
_LOG_EVERY_S = 2.0


@dataclass(frozen=True)
class FileFact:
    """What identifies one file's content."""

    sha256: str
    size: int
    rows: int | None = None
    """Lines that are not blank."""


@dataclass(frozen=True)
class FoundFiles:
    """A data set's files, where they lie and where they come from."""

    directory: Path
    files: dict[str, FileFact]
    origin: str
    official: bool
    """Every file has the checksum of the official one."""


def locate(
    dataset: str,
    *,
    data_dir: Path | None,
    sample_dir: Path,
    cache_dir: Path,
    log: Log,
    download: bool = True,
) -> FoundFiles:
    """Finds the files of ``dataset``, downloading the official archive as a last resort.

    ``data_dir`` (LLMREC_DATA_DIR) is a directory that holds ``<dataset>/``, the files themselves
    or ``<dataset>.zip``, or is such a zip. Where it is given nothing else is tried: a typing error
    must not become a download. Raises DataError naming what was looked for.
    """
    if dataset == "sample":
        if missing := _missing(sample_dir, FORMATS[dataset]):
            raise DataError(
                f"sample: {sample_dir} has no {', '.join(missing)}. Restore that directory from "
                "the project, for instance with git checkout."
            )
        return _found(dataset, sample_dir, "the project's sample", log)
    if data_dir is not None:
        return _in_named_place(dataset, data_dir.expanduser(), cache_dir, log)
    url = OFFICIAL[dataset].url
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Two runs that both need the data set: the second waits and finds it downloaded.
        with FileLock(cache_dir / f"{dataset}.lock"):
            zip_path = _official_zip(dataset, cache_dir, log, download)
            directory = _unpacked(zip_path, dataset, cache_dir)
    except OSError as error:
        raise DataError(
            f"{dataset}: {cache_dir} cannot be used for downloads ({error}). Make room or "
            "permissions there, or set LLMREC_DATA_DIR to a directory or zip with the data set."
        ) from error
    return _found(dataset, directory, url, log)


def copy_files(found: FoundFiles, destination: Path) -> None:
    """Copies the found files into ``destination``, checking that they are still the same."""
    destination.mkdir(parents=True, exist_ok=True)
    for name, fact in found.files.items():
        try:
            shutil.copyfile(found.directory / name, destination / name)
        except OSError as error:
            raise DataError(
                f"{found.directory / name} cannot be copied to {destination} ({error.strerror}). "
                "Make it readable, and room for it."
            ) from error
        if sha256_of(destination / name) != fact.sha256:
            raise DataError(
                f"{found.directory / name} changed while it was read. Retry when nothing writes it."
            )


def _missing(directory: Path, form: DatasetFormat) -> list[str]:
    return [name for name in form.required if not (directory / name).is_file()]


def _found(dataset: str, directory: Path, origin: str, log: Log) -> FoundFiles:
    form = FORMATS[dataset]
    files: dict[str, FileFact] = {}
    for name in (*form.required, *form.optional):
        if name in form.optional and not (directory / name).is_file():
            continue
        try:
            data = (directory / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"{dataset}: {directory / name} cannot be read ({error.strerror}). Make it a "
                "readable file."
            ) from error
        rows = sum(1 for line in data.split(b"\n") if line.strip())
        files[name] = FileFact(hashlib.sha256(data).hexdigest(), len(data), rows)
    official = False
    if dataset in OFFICIAL:
        expected = OFFICIAL[dataset].files
        other = [name for name, fact in files.items() if fact.sha256 != expected[name]]
        official = not other
        log(
            f"{dataset}: using the official files from {origin}"
            if official
            else f"{dataset}: using files from {origin} that are not the official ones: "
            f"{', '.join(other)} differ. Results do not compare with published ones."
        )
    return FoundFiles(directory, files, origin, official)


def _in_named_place(dataset: str, place: Path, cache_dir: Path, log: Log) -> FoundFiles:
    form = FORMATS[dataset]
    names = ", ".join(form.required)
    for directory in (place / dataset, place):
        if not _missing(directory, form):
            return _found(dataset, directory, str(directory), log)
    zip_path = place if place.is_file() else place / f"{dataset}.zip"
    if zip_path.is_file() and _looks_like_zip(zip_path) and contains(zip_path, form.required):
        return _found(dataset, _unpacked(zip_path, dataset, cache_dir), str(zip_path), log)
    if not place.exists():
        what = "there is no such file or directory"
    elif place.is_file():
        what = f"it is neither a directory nor a zip with {names}"
    else:
        what = f"looked for {names} in {place / dataset} and {place}, and for {zip_path}"
        for directory in (place / dataset, place):
            missing = _missing(directory, form)
            if len(missing) < len(form.required):
                what += f"; {directory} lacks {', '.join(missing)}"
        if zip_path.is_file():
            what += f"; {zip_path.name} is no zip with all of them"
    raise DataError(
        f"{dataset}: LLMREC_DATA_DIR names {place}, which does not hold it: {what}. "
        f"Put the files there, or unset LLMREC_DATA_DIR to download {OFFICIAL[dataset].url}."
    )


def _looks_like_zip(path: Path) -> bool:
    # By name or first bytes, not by ``is_zipfile``: a truncated zip deserves its own message.
    if path.suffix.lower() == ".zip":
        return True
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def _unpacked(zip_path: Path, dataset: str, cache_dir: Path) -> Path:
    form = FORMATS[dataset]
    try:
        # By content, so that another zip under the same name is unpacked anew; by data set, since
        # one zip may hold both.
        target = cache_dir / "unpacked" / sha256_of(zip_path) / dataset
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{dataset}.lock"):
            return unpack(zip_path, form.required, form.optional, target)
    except OSError as error:
        raise DataError(
            f"{dataset}: {zip_path} cannot be unpacked into {cache_dir} ({error}). Make the one "
            "readable and the other writable, or unpack it yourself and set LLMREC_DATA_DIR to "
            "the directory."
        ) from error


def _official_zip(dataset: str, cache_dir: Path, log: Log, download: bool) -> Path:
    archive = OFFICIAL[dataset]
    target = cache_dir / f"{dataset}.zip"
    if target.is_file():
        problem = _difference(target, archive)
        if problem is None:
            log(f"{dataset}: the archive was downloaded earlier: {target}")
            return target
        log(f"{dataset}: the earlier download {target} is not the official archive: {problem}")
        if download:
            target.unlink()
    if not download:
        raise DataError(
            f"{dataset}: not downloaded yet, and downloading is off. Set LLMREC_DATA_DIR to a "
            f"directory or zip that holds it (official archive: {archive.url})."
        )
    log(f"{dataset}: downloading {archive.url} (GroupLens: for research, no redistribution)")
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _download(dataset, archive, part, log)
    problem = _difference(part, archive)
    if problem is not None and resumed:
        log(f"{dataset}: what an earlier attempt left does not fit ({problem}); starting over")
        part.unlink()
        _download(dataset, archive, part, log)
        problem = _difference(part, archive)
    if problem is not None:
        part.unlink()
        raise DataError(
            f"{dataset}: what {archive.url} sent is not the official archive: {problem}. Nothing "
            f"was kept. Retry; if it happens again, {_BY_HAND}"
        )
    part.rename(target)
    return target


_BY_HAND = (
    "get the archive another way (a proxy may have replaced it) and set LLMREC_DATA_DIR to the "
    "directory or zip that holds it."
)


def _difference(path: Path, archive: OfficialArchive) -> str | None:
    data = path.read_bytes()
    if archive.size is not None and len(data) != archive.size:
        return f"{path.name} has {len(data):,} bytes, expected {archive.size:,}"
    for name, expected in (("md5", archive.md5), ("sha256", archive.sha256)):
        found = hashlib.new(name, data, usedforsecurity=False).hexdigest()
        if expected is not None and found != expected:
            return f"{path.name} has {name} {found}, expected {expected}"
    return None


def _download(dataset: str, archive: OfficialArchive, part: Path, log: Log) -> None:
    """Fetches the archive into ``part``, taking up what is already there."""
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            wait = RETRY_WAIT_S * 2 ** (attempt - 1)
            log(f"{dataset}: download interrupted ({problem}); again in {wait:g} s")
            time.sleep(wait)
        try:
            _fetch_rest(dataset, archive, part, log)
            return
        except requests.HTTPError as error:
            problem = without_secrets(str(error))
            if error.response.status_code < 500 and error.response.status_code != 429:
                break
        except _UnusableProxy as error:
            problem = str(error)
            break
        except requests.RequestException as error:
            problem = without_secrets(str(error))
    raise DataError(
        f"{dataset}: {archive.url} cannot be downloaded ({problem}). Check the network and proxy "
        "settings (HTTPS_PROXY) and retry: what has arrived is kept. Without network, set "
        "LLMREC_DATA_DIR to a directory or zip that holds the data set."
    )


class _UnusableProxy(requests.RequestException):
    """The environment names a proxy by something that is no URL."""


def _open(url: str, headers: Mapping[str, str]) -> requests.Response:
    try:
        return requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S)
    # The archive's URL is ours and sound, so these are about the proxy's. What they say may quote
    # it, with a password cut anywhere: only their kind is told. TypeError: it has no host.
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
        TypeError,
    ) as error:
        kind = type(error).__name__
        raise _UnusableProxy(f"the environment's proxy URL cannot be used: {kind}") from None


def _fetch_rest(dataset: str, archive: OfficialArchive, part: Path, log: Log) -> None:
    have = part.stat().st_size if part.exists() else 0
    # Not compressed on the way: a byte range must count the file's own bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with _open(archive.url, headers) as response:
        if response.status_code == 416:  # nothing after what is there: complete, or too much
            if _difference(part, archive) is None:
                return
            part.unlink()
            raise requests.ConnectionError("the part already there does not fit")
        response.raise_for_status()
        takes_up = response.status_code == 206 and response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {have}-")
        if response.status_code == 206 and not takes_up:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server sent another byte range than asked for")
        if not takes_up:
            have = 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else archive.size
        last = time.monotonic()
        with part.open("ab" if takes_up else "wb") as sink:
            # A cut connection loses the chunk under way, so chunks are small.
            for chunk in response.iter_content(2**13):
                have += sink.write(chunk)
                if have > _MAX_ARCHIVE_BYTES:
                    part.unlink()
                    raise DataError(
                        f"{dataset}: {archive.url} sent more than {_MAX_ARCHIVE_BYTES:,} bytes, "
                        f"so it is not the official archive. Nothing was kept; {_BY_HAND}"
                    )
                if time.monotonic() - last >= _LOG_EVERY_S:
                    last = time.monotonic()
                    share = f" of {total / 1e6:.1f} MB ({have / total:.0%})" if total else " MB"
                    log(f"{dataset}: {have / 1e6:.1f}{share}")
    if total is not None and have < total:
        raise requests.ConnectionError(f"{have:,} of {total:,} bytes arrived")
