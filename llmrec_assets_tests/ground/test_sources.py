"""Where files come from: named places, earlier downloads, and a GroupLens that misbehaves.

The archives here are invented and served from 127.0.0.1; nothing asks the real server.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmrec_assets.ground import sources
from llmrec_assets.ground.archives import sha256_of
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.sources import (
    OFFICIAL,
    FileFact,
    FoundFiles,
    OfficialArchive,
    copy_files,
    locate,
)

# Noise, so that the archive stays larger than what a cut connection delivers.
_NOISE = random.Random(5)
FILES = {
    name: b"".join(b"%d\n" % _NOISE.randrange(10**9) for _ in range(20_000))
    for name in ("u.data", "u.item", "u.user")
}


def zipped(files: dict[str, bytes], folder: str = "ml-100k/") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(folder + name), content)
    return stream.getvalue()


ARCHIVE = zipped(FILES)


class Server:
    """A GroupLens that serves ``content``; ``cuts`` say after how many bytes replies break off."""

    def __init__(self) -> None:
        self.content = ARCHIVE
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.ranges_supported = True
        self.asked: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.asked.append(asked)
                if server.statuses:
                    self.send_response(server.statuses.pop(0))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(asked[6:-1]) if asked and server.ranges_supported else 0
                total = len(server.content)
                if start >= total:
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = server.content[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/ml-100k.zip"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    archive = OfficialArchive(
        url=server.url,
        md5=hashlib.md5(ARCHIVE, usedforsecurity=False).hexdigest(),
        sha256=hashlib.sha256(ARCHIVE).hexdigest(),
        size=len(ARCHIVE),
        files={name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
        | {"u.genre": "", "u.occupation": ""},
    )
    monkeypatch.setitem(OFFICIAL, "ml-100k", archive)
    monkeypatch.setattr(sources, "RETRY_WAIT_S", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.http.shutdown()
    server.http.server_close()


Find = Callable[..., FoundFiles]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def find(tmp_path: Path, lines: list[str]) -> Find:
    def find(
        dataset: str = "ml-100k", data_dir: Path | None = None, download: bool = True
    ) -> FoundFiles:
        return locate(
            dataset,
            data_dir=data_dir,
            sample_dir=tmp_path / "sample",
            cache_dir=tmp_path / "cache",
            log=lines.append,
            download=download,
        )

    return find


def write(directory: Path, files: dict[str, bytes] = FILES) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def assert_is_official(found: FoundFiles) -> None:
    assert found.official
    assert {name: (found.directory / name).read_bytes() for name in found.files} == FILES
    content = FILES["u.data"]
    assert found.files["u.data"] == FileFact(
        hashlib.sha256(content).hexdigest(), len(content), 20_000
    )


def test_sample(tmp_path: Path, find: Find) -> None:
    with pytest.raises(DataError, match=r"sample has no u\.data, u\.item, u\.user\. Restore"):
        find("sample")
    write(tmp_path / "sample")
    found = find("sample", data_dir=tmp_path / "nowhere")
    assert (found.directory, found.official) == (tmp_path / "sample", False)
    assert list(found.files) == ["u.data", "u.item", "u.user"]


def test_named_places(tmp_path: Path, server: Server, find: Find) -> None:
    inside = write(tmp_path / "one" / "ml-100k")
    itself = write(tmp_path / "two")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "ml-100k.zip").write_bytes(ARCHIVE)
    (tmp_path / "named otherwise").write_bytes(ARCHIVE)
    for data_dir, origin in (
        (tmp_path / "one", inside),
        (tmp_path / "two", itself),
        (tmp_path / "three", tmp_path / "three" / "ml-100k.zip"),
        (tmp_path / "named otherwise", tmp_path / "named otherwise"),
    ):
        found = find(data_dir=data_dir)
        assert_is_official(found)
        assert found.origin == str(origin)
    unpacked = tmp_path / "cache" / "unpacked" / hashlib.sha256(ARCHIVE).hexdigest() / "ml-100k"
    assert found.directory == unpacked
    assert server.asked == []


def test_a_named_place_without_the_data_set_is_an_error_not_a_download(
    tmp_path: Path, server: Server, find: Find
) -> None:
    write(tmp_path / "ml-100k", {"u.data": b"1"})
    (tmp_path / "list.txt").write_bytes(b"text")
    (tmp_path / "other.zip").write_bytes(zipped({"ratings.dat": b"1"}))
    for data_dir, what in (
        (tmp_path, r"looked for u\.data, u\.item, u\.user in .*lacks u\.item, u\.user"),
        (tmp_path / "nowhere", "there is no such file or directory"),
        (tmp_path / "list.txt", "it is neither a directory nor a zip with u.data, u.item, u.user"),
        (tmp_path / "other.zip", "it is neither a directory nor a zip with u.data, u.item"),
    ):
        with pytest.raises(DataError, match=what) as raised:
            find(data_dir=data_dir)
        assert f"ml-100k: LLMREC_DATA_DIR names {data_dir}" in str(raised.value)
        assert "or unset LLMREC_DATA_DIR to download" in str(raised.value)
    assert server.asked == []


def test_a_truncated_zip_is_named(tmp_path: Path, find: Find) -> None:
    (tmp_path / "ml-100k.zip").write_bytes(ARCHIVE[:-50])
    with pytest.raises(DataError, match=r"ml-100k\.zip cannot be unpacked .* Delete it and retry"):
        find(data_dir=tmp_path)


def test_other_files_are_accepted_and_said_to_be_other(
    tmp_path: Path, server: Server, find: Find, lines: list[str]
) -> None:
    write(tmp_path / "mine", FILES | {"u.item": b"1|other\n\n2|films"})
    found = find(data_dir=tmp_path / "mine")
    assert not found.official
    assert found.files["u.item"].rows == 2
    assert "not the official ones: u.item differ" in lines[-1]


def test_download_then_the_earlier_download(
    tmp_path: Path, server: Server, find: Find, lines: list[str]
) -> None:
    found = find()
    assert_is_official(found)
    assert found.origin == server.url
    assert any("downloading" in line and "research" in line for line in lines)
    again = find(download=False)
    assert again == found
    assert server.asked == [None]
    assert not list(tmp_path.glob("cache/*.part"))


def test_progress_is_logged(
    server: Server, find: Find, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_LOG_EVERY_S", 0)
    find()
    assert any("MB (100%)" in line for line in lines)


def test_an_altered_earlier_download_is_replaced(
    tmp_path: Path, server: Server, find: Find, lines: list[str]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ml-100k.zip").write_bytes(ARCHIVE[:-1] + b"?")
    with pytest.raises(DataError, match="downloading is off"):
        find(download=False)
    assert_is_official(find())
    assert any("is not the official archive" in line for line in lines)


def test_cut_connections_are_taken_up_where_they_broke(
    server: Server, find: Find, lines: list[str]
) -> None:
    server.cuts = [100_000, 50_000]
    assert_is_official(find())
    assert server.asked[0] is None
    starts = [int(asked[6:-1]) for asked in server.asked[1:] if asked]
    assert len(starts) == 2
    assert 0 < starts[0] <= 100_000
    assert starts[0] < starts[1] <= 150_000
    assert sum("interrupted" in line for line in lines) == 2


def test_a_later_run_takes_up_what_an_earlier_one_left(
    tmp_path: Path, server: Server, find: Find
) -> None:
    server.cuts = [30_000] * sources.ATTEMPTS
    with pytest.raises(DataError, match=r"cannot be downloaded .* what has arrived is kept"):
        find()
    have = (tmp_path / "cache" / "ml-100k.zip.part").stat().st_size
    assert have > 0
    assert_is_official(find())
    assert server.asked[-1] == f"bytes={have}-"


def test_a_server_without_ranges_sends_all_again(
    tmp_path: Path, server: Server, find: Find
) -> None:
    server.ranges_supported = False
    server.cuts = [100_000]
    assert_is_official(find())
    assert len(server.asked) == 2


@pytest.mark.parametrize("left", [b"x" * 1000, ARCHIVE, ARCHIVE + b"more"], ids=len)
def test_a_strange_part_is_used_or_dropped(
    tmp_path: Path, server: Server, find: Find, left: bytes
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ml-100k.zip.part").write_bytes(left)
    assert_is_official(find())


def test_a_wrong_checksum_keeps_nothing(tmp_path: Path, server: Server, find: Find) -> None:
    server.content = ARCHIVE[:-1] + b"?"
    with pytest.raises(DataError, match=r"has md5 .*, expected .* LLMREC_DATA_DIR"):
        find()
    server.content = b"<html>Please log in to the hotel network</html>"
    with pytest.raises(DataError, match=r"has 47 bytes, expected [\d,]+\. Nothing was kept"):
        find()
    assert not [path for path in (tmp_path / "cache").iterdir() if "zip" in path.name]


def test_too_much_is_not_read_to_its_end(
    tmp_path: Path, server: Server, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_ARCHIVE_BYTES", 70_000)
    with pytest.raises(DataError, match="sent more than 70,000 bytes"):
        find()
    assert not list(tmp_path.glob("cache/*.part"))


def test_a_server_error_is_tried_again_and_a_refusal_is_not(server: Server, find: Find) -> None:
    server.statuses = [404]
    with pytest.raises(DataError, match="404"):
        find()
    assert len(server.asked) == 1
    server.statuses = [503, 500]
    assert_is_official(find())
    assert len(server.asked) == 4


def test_without_network(
    server: Server, find: Find, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        port = unused.getsockname()[1]
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(DataError, match=r"cannot be downloaded .* set LLMREC_DATA_DIR"):
            find()
    assert len(server.asked) == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://bertha:s3cret@proxy:port",
        "http://bertha:s3cret@[half",
        "http://bertha:s3/s3cret@127.0.0.1:1",
        "http://bertha:s3cret@",
        "bertha:s3cret@proxy.example:99999",
        "ftp://bertha:s3cret@127.0.0.1:1",
        "://bertha:s3cret@127.0.0.1",
    ],
)
def test_a_malformed_proxy_is_said_once_and_without_its_password(
    url: str, server: Server, find: Find, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.setattr(sources, "RETRY_WAIT_S", 60)
    with pytest.raises(DataError, match="the environment's proxy URL cannot be used") as caught:
        find()
    told = str([caught.value, caught.value.__cause__, caught.value.__context__, *lines])
    assert "s3" not in told and "bertha" not in told


def test_a_proxy_that_is_not_there_is_told_without_its_password(
    server: Server, find: Find, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("http_proxy", f"http://bertha:s3cret@127.0.0.1:{port}")
        with pytest.raises(DataError, match="Unable to connect to proxy") as caught:
            find()
    assert "s3cret" not in f"{caught.value} {lines}"


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: Server, find: Find) -> None:
    (tmp_path / "cache").write_bytes(b"a file stands in the way")
    with pytest.raises(DataError, match="cannot be used for downloads"):
        find()
    (tmp_path / "ml-100k.zip").write_bytes(ARCHIVE)
    with pytest.raises(DataError, match="cannot be unpacked into"):
        find(data_dir=tmp_path)


def test_copy_files(tmp_path: Path, server: Server, find: Find) -> None:
    place = write(tmp_path / "mine", FILES | {"notes.txt": b"private"})
    found = find(data_dir=place)
    copy_files(found, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == FILES
    (place / "u.user").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"u\.user changed while it was read"):
        copy_files(found, tmp_path / "second copy")
    (place / "u.user").unlink()
    with pytest.raises(DataError, match=r"u\.user cannot be copied"):
        copy_files(found, tmp_path / "third copy")


def test_the_real_files(find: Find) -> None:
    shared = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    place = Path(os.environ.get("LLMREC_DATA_DIR", shared))
    if not (place / "ml-100k" / "u.data").is_file() or not (place / "ml-1m").is_dir():
        pytest.skip(f"{place} does not hold ml-100k/ and ml-1m/: set LLMREC_DATA_DIR")
    found = find("ml-100k", data_dir=place)
    assert found.official
    assert found.files["u.data"].rows == 100_000
    found = find("ml-1m", data_dir=place)
    assert found.official == (found.files["ratings.dat"].rows == 1_000_209)
    assert found.files["users.dat"].sha256 == sha256_of(found.directory / "users.dat")
