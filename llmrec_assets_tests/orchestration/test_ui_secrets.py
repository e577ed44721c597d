"""No secret of the environment is found in anything that is written or printed.

The UI's environment holds one in every variable of ours that takes one (``ui_server.planted``), its
hub quotes the token it is shown, its proxy cannot be reached, and runs succeed and fail in it. Here
all that came of it is read: logs, Dagster's databases, tables, manifests, pages, command lines.
"""

from __future__ import annotations

import base64
import re
import sqlite3
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ui_server import Ui
from ui_session import Clicked

from llmrec_assets import cli

if TYPE_CHECKING:
    from conftest import Home

pytestmark = pytest.mark.timeout(900)


def spellings(secret: str) -> set[bytes]:
    """As a secret may be written: as it is, quoted, in UTF-16, and in base64 at any offset."""
    found = {secret.encode(), secret.encode("utf-16-le"), urllib.parse.quote(secret).encode()}
    for offset in range(3):  # what stands before it shifts base64
        before = b"x" * offset + secret.encode()
        # The first and the last characters also hold bits of what stands beside it.
        found.add(base64.b64encode(before)[-(-offset * 8 // 6) : len(before) // 3 * 4])
    return found


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is packed in it: Parquet columns, zlib values of SQLite rows."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr(table.schema.metadata).encode()
        yield str(table.to_pydict()).encode()
    elif path.suffix == ".db":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            tables = database.execute("select name from sqlite_master where type = 'table'")
            for (name,) in tables.fetchall():
                for row in database.execute(f'select * from "{name}"'):
                    for value in row:
                        if isinstance(value, bytes):
                            yield unpacked(value)
                        elif isinstance(value, str):
                            yield value.encode()


def unpacked(value: bytes) -> bytes:
    try:
        return zlib.decompress(value)
    except zlib.error:
        return value


def where(secrets: dict[str, str], root: Path) -> list[str]:
    """Which secret stands in which file below ``root``."""
    wanted = {
        name: re.compile(b"|".join(map(re.escape, spellings(secret))))
        for name, secret in secrets.items()
    }
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            for text in contents(path):
                found += [
                    f"{name} in {path.relative_to(root)}"
                    for name, pattern in wanted.items()
                    if pattern.search(text)
                ]
    return sorted(set(found))


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    secret = "hf_Pl4nted"
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.err").write_text(f"Authorization: Bearer {secret}")
    coded = base64.b64encode(f"proxy-user:{secret}".encode())
    (tmp_path / "header.txt").write_bytes(b"Proxy-Authorization: Basic " + coded)
    table = pa.table({"a": [f"{secret} " * 1000]})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    with sqlite3.connect(tmp_path / "runs.db") as database:
        database.execute("create table snapshots (body blob)")
        packed = zlib.compress(f"{secret} and more, {secret}".encode())
        database.execute("insert into snapshots values (?)", [packed])
    (tmp_path / "clean.json").write_text('{"token": "<HF_TOKEN>"}')
    assert where({"HF_TOKEN": secret}, tmp_path) == [
        f"HF_TOKEN in {name}" for name in ("header.txt", "log/1.err", "runs.db", "t.parquet")
    ]


@pytest.fixture
def told(
    ui: Ui, clicked: Clicked, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command in the UI's home, with the UI's environment; returns what it printed."""
    environment = ui.home.environment(**ui.planted.environment)
    for name in (*ui.planted.environment, "LLMREC_HOME", "DAGSTER_HOME", "LLMREC_LOCK_DIR"):
        monkeypatch.setenv(name, environment[name])

    def told(*arguments: str) -> str:
        status = cli.main(list(arguments))
        said = capfd.readouterr()
        return f"{said.out}{said.err}status {status}"

    return told


def test_commands_tell_no_secret(
    told: Callable[..., str], ui: Ui, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ui.planted.environment["HTTPS_PROXY"]
    said = [told("lineage", "--dataset", "sample", "--recipe", "tiny"), told("health")]
    assert "metric_table" in said[0] and "has missed a tick" in said[1]
    monkeypatch.setenv("HTTPS_PROXY", proxy.replace("@", "@["))
    failed = told("run", "--dataset", "ml-100k", "--recipe", "tiny")
    assert "the environment's proxy URL cannot be used" in failed and "status 1" in failed
    for secret in ui.planted.secrets.values():
        assert not any(secret in text for text in (*said, failed))


def test_no_secret_is_written_anywhere(ui: Ui, clicked: Clicked) -> None:
    planted, home = ui.planted, ui.home
    for run_id in planted.failing_runs:
        ui.wait(run_id, 120, until=lambda run_id=run_id: ui.run(run_id)["status"] == "FAILURE")
    # The token was used: the hub saw it, and quoted it in its refusal.
    assert f"Bearer {planted.secrets['HF_TOKEN']}" in planted.hub.authorizations
    log = log_of(home)
    assert "the hub refuses" in log and "cannot be downloaded" in log
    # So was the webhook, and the password on the way to a mail server that is not there.
    deadline = time.monotonic() + 90
    while not set(planted.failing_runs) <= {alert["run_id"] for alert in planted.webhook.posted}:
        assert time.monotonic() < deadline, planted.webhook.posted
        time.sleep(0.5)
    assert where(planted.secrets, home.root) == []
    for secret in planted.secrets.values():
        assert secret not in str(planted.webhook.posted)
        assert not any(secret in line for line in command_lines())


def log_of(home: Home) -> str:
    return (home.root / "output.log").read_text()


def command_lines() -> list[str]:
    """Every process's: any user of the machine can read them."""
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        lines.append(" ".join(process.info["cmdline"] or []))
    return lines
