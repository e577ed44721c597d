"""The webhook: where it may be, what is posted, and that its URL is nowhere."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from llmrec_assets.ground.alerts import WEBHOOK, post, webhook
from llmrec_assets.ground.errors import LlmrecError

SECRET = "T0p-s3cret"


@dataclass
class Hook:
    """A server that remembers what was posted to it."""

    port: int = 0
    status: int = 200
    posted: list[dict] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/services/{SECRET}"


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            hook.posted.append(json.loads(self.rfile.read(length)))
            self.send_response(hook.status)
            if hook.status == 302:
                self.send_header("Location", f"http://127.0.0.1:{hook.port}/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    hook.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hook
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "url",
    [
        f"https://hooks.example.org/services/{SECRET}",
        f"http://localhost:8080/{SECRET}",
        f"http://127.0.0.1/{SECRET}",
        f"http://[::1]:9000/{SECRET}",
    ],
)
def test_https_anywhere_and_http_on_this_machine(url: str, monkeypatch) -> None:
    monkeypatch.setenv(WEBHOOK, f" {url} ")
    assert webhook() == url


@pytest.mark.parametrize(
    "url",
    [
        f"http://hooks.example.org/{SECRET}",
        f"http://localhost.example.org/{SECRET}",
        f"http://127.0.0.1@example.org/{SECRET}",
        f"ftp://localhost/{SECRET}",
        f"file:///{SECRET}",
        f"//example.org/{SECRET}",
        f"https:///{SECRET}",
        f"https://[half/{SECRET}",
        SECRET,
    ],
)
def test_anything_else_is_refused_without_being_shown(url: str, monkeypatch) -> None:
    monkeypatch.setenv(WEBHOOK, url)
    with pytest.raises(LlmrecError, match="is not a https:// URL") as caught:
        webhook()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["", "   "])
def test_without_it_there_is_none(value: str, monkeypatch) -> None:
    monkeypatch.delenv(WEBHOOK, raising=False)
    assert webhook() is None
    monkeypatch.setenv(WEBHOOK, value)
    assert webhook() is None


def test_an_alert_is_posted_as_json(hook: Hook) -> None:
    assert post(hook.url, {"text": "it failed: „naïve“", "run_id": "7"}) is None
    assert hook.posted == [{"text": "it failed: „naïve“", "run_id": "7"}]


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_refusing_webhook_is_told_without_its_url(hook: Hook, status: int) -> None:
    hook.status = status
    assert post(hook.url, {"text": "x"}) == f"the alert webhook at 127.0.0.1 answered {status}"
    assert len(hook.posted) == 1  # a redirect is not followed


def test_a_webhook_that_is_not_there_is_told_without_its_url() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = post(f"http://127.0.0.1:{port}/{SECRET}", {"text": "x"})
    assert said == "the alert webhook at 127.0.0.1 cannot be reached (ConnectionError)"
