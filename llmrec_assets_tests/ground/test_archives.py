"""Zips from anywhere: the good ones come out whole, the others name what is wrong."""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import archives
from llmrec_assets.ground.archives import contains, unpack
from llmrec_assets.ground.errors import DataError

REQUIRED, OPTIONAL = ("a.dat", "b.dat"), ("c.dat",)
GOOD = {"set/a.dat": b"1::2\n" * 50, "set/b.dat": b"3::4\n"}


def make_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def refusal(zip_path: Path) -> str:
    target = zip_path.parent / "out" / "set"
    with pytest.raises(DataError) as raised:
        unpack(zip_path, REQUIRED, OPTIONAL, target)
    assert not target.exists()
    assert not target.parent.exists() or not list(target.parent.iterdir())
    assert str(zip_path) in str(raised.value)
    return str(raised.value)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_only_the_named_files_come_out(tmp_path: Path) -> None:
    entries = GOOD | {"set/c.dat": b"x", "set/other": b"y", "__MACOSX/set/a.dat": b"z"}
    target = unpack(make_zip(tmp_path / "z.zip", entries), REQUIRED, OPTIONAL, tmp_path / "o" / "t")
    assert names(target) == ["a.dat", "b.dat", "c.dat"]
    assert (target / "a.dat").read_bytes() == GOOD["set/a.dat"]
    assert names(target.parent) == ["t"]


def test_an_altered_copy_is_unpacked_again(tmp_path: Path) -> None:
    zip_path = make_zip(tmp_path / "z.zip", GOOD)
    target = unpack(zip_path, REQUIRED, OPTIONAL, tmp_path / "t")
    untouched = (target / "a.dat").stat().st_ino
    assert unpack(zip_path, REQUIRED, OPTIONAL, target) == target
    assert (target / "a.dat").stat().st_ino == untouched
    (target / "a.dat").write_bytes(b"altered")
    (target / "c.dat").write_bytes(b"not from the archive")
    unpack(zip_path, REQUIRED, OPTIONAL, target)
    assert names(target) == ["a.dat", "b.dat"]
    assert (target / "a.dat").read_bytes() == GOOD["set/a.dat"]


def test_contains(tmp_path: Path) -> None:
    zip_path = make_zip(tmp_path / "z.zip", GOOD)
    assert contains(zip_path, ["a.dat", "b.dat"])
    assert not contains(zip_path, ["a.dat", "set"])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../evil.dat", "climbs out of the archive"),
        ("set/../../a.dat", "climbs out of the archive"),
        ("..\\evil.dat", "climbs out of the archive"),
        ("/etc/evil", "has an absolute path"),
        ("\\evil", "has an absolute path"),
        ("C:\\evil", "has an absolute path"),
        ("again/a.dat", "both claim to be a.dat"),
    ],
)
def test_hostile_names(tmp_path: Path, name: str, what: str) -> None:
    message = refusal(make_zip(tmp_path / "z.zip", GOOD | {name: b"x"}))
    assert what in message
    assert "LLMREC_DATA_DIR" in message
    assert names(tmp_path) == ["z.zip"]


def test_names_with_nul(tmp_path: Path) -> None:
    zip_path = make_zip(tmp_path / "z.zip", GOOD | {"set/xtra": b"x"})
    zip_path.write_bytes(zip_path.read_bytes().replace(b"set/xtra", b"\0et/xtra"))
    assert "has no usable name" in refusal(zip_path)


def test_links(tmp_path: Path) -> None:
    zip_path = make_zip(tmp_path / "z.zip", {"b.dat": b"x"})
    link = zipfile.ZipInfo("a.dat")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(zip_path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "'a.dat' is a link" in refusal(zip_path)


def test_bombs(tmp_path: Path) -> None:
    bomb = make_zip(tmp_path / "bomb.zip", GOOD | {"set/a.dat": bytes(5 * 2**20)})
    assert "grows more than 100-fold" in refusal(bomb)


def test_files_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 200)
    message = refusal(make_zip(tmp_path / "z.zip", GOOD))
    assert "'set/a.dat' has 250 bytes, more than 200" in message


def test_a_declared_size_that_lies(tmp_path: Path) -> None:
    zip_path = make_zip(tmp_path / "z.zip", GOOD)
    # 250 bytes declared as 3, in the central directory and the local header.
    content = zip_path.read_bytes().replace((250).to_bytes(4, "little"), b"\3\0\0\0")
    zip_path.write_bytes(content)
    assert "Delete it and retry" in refusal(zip_path)


def test_encrypted(tmp_path: Path) -> None:
    zip_path = make_zip(tmp_path / "z.zip", GOOD)
    content = bytearray(zip_path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + offset] |= 1
    zip_path.write_bytes(content)
    assert "'set/a.dat' is encrypted" in refusal(zip_path)


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_MAX_ENTRIES", 1)
    assert "is one of more than 1" in refusal(make_zip(tmp_path / "z.zip", GOOD))


def test_a_required_file_lacks(tmp_path: Path) -> None:
    message = refusal(make_zip(tmp_path / "z.zip", {"set/a.dat": b"x"}))
    assert "has no b.dat" in message
    assert "must hold a.dat, b.dat" in message


@pytest.mark.parametrize("keep", [0, 1, 30, 100, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    zip_path = make_zip(tmp_path / "z.zip", GOOD)
    zip_path.write_bytes(zip_path.read_bytes()[:keep])
    assert "Delete it and retry" in refusal(zip_path)


def test_a_wrong_byte_in_a_file(tmp_path: Path) -> None:
    zip_path = tmp_path / "z.zip"
    with zipfile.ZipFile(zip_path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in GOOD.items():
            archive.writestr(name, content)
    zip_path.write_bytes(zip_path.read_bytes().replace(b"1::2", b"1::3", 1))
    assert "Bad CRC-32" in refusal(zip_path)


@settings(max_examples=100, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1))
def test_damaged_bytes_raise_nothing_but_data_errors(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in GOOD.items():
            archive.writestr(name, text)
    content = bytearray(whole.getvalue())
    for position, value in edits:
        content[position % len(content)] = value
    (directory / "z.zip").write_bytes(content)
    try:
        target = unpack(directory / "z.zip", REQUIRED, OPTIONAL, directory / "t")
    except DataError:
        assert names(directory) == ["z.zip"]
    else:
        assert {"a.dat", "b.dat"} <= set(names(target))
