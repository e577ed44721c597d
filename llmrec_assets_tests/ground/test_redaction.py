"""Secrets of the environment in a text, in every spelling a library may give them."""

from __future__ import annotations

import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.redaction import PROXIES, SECRETS, without_secrets


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SECRETS, *PROXIES, *map(str.lower, PROXIES)):
        monkeypatch.delenv(name, raising=False)


def test_secrets_of_the_environment_are_named_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_ALERT_WEBHOOK", "https://example.org/T0p")
    monkeypatch.setenv("HF_TOKEN", " hf_abc\n")
    text = without_secrets("GET https://example.org/T0p with hf_abc failed")
    assert text == "GET <LLMREC_ALERT_WEBHOOK> with <HF_TOKEN> failed"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "text",
    [
        "Failed to parse: http://ann:p@ss/word 1@proxy:x",
        "Failed to parse: 'ann:p@ss/word 1' is not a host",
        "the password p@ss/word 1 is wrong",
        "ann:p%40ss%2Fword%201",
    ],
)
def test_credentials_of_a_proxy_are_blotted_out(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://ann:p@ss/word 1@proxy:x")
    told = without_secrets(text)
    assert "ss/word" not in told and "p%40ss" not in told
    assert f"of {name.upper()}>" in told


@given(st.text(st.characters(codec="ascii", exclude_characters="/?#'\" \n\r\t"), max_size=30))
def test_what_stands_before_the_at_of_any_url_goes(credentials: str) -> None:
    quoted = urllib.parse.quote(credentials, safe="")
    for given_as in (credentials, quoted):
        if given_as.isprintable():
            told = without_secrets(f"GET ftp://{given_as}@example.org/a@b failed")
            assert told == "GET ftp://<credentials>@example.org/a@b failed"


def test_other_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://a:b@proxy:1")  # too short to go by itself
    for text in (
        "a mail to ann@example.org about https://example.org/~ann@home",
        "Could not reach https://files.example.org/a.zip?x=1@2",
        "",
    ):
        assert without_secrets(text) == text
