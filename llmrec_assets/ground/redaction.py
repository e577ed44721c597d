"""What must not stand in a message: secrets that this process was given by its environment.

What belongs here: which variables are secret, and blotting their values out of a text. What does
not: anything that could do without quoting a secret in the first place; that is the first defence.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator

#: Variables whose whole value is secret.
SECRETS = (
    "LLMREC_ALERT_WEBHOOK",
    "LLMREC_ALERT_EMAIL_PASSWORD",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
#: Variables whose value may hold a user and a password before its last ``@``; in lower case too.
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")

# Shorter passwords are blotted out with their user alone: every "a" would go otherwise.
_SHORTEST = 4

# Greedy: a password may hold another @, an authority ends at the first of / ? #.
_USER_INFO = re.compile(r"(?<=://)[^\s/?#'\"]*@")


def without_secrets(text: str) -> str:
    """The text with the webhook's URL, the e-mail password, the hub's tokens and the credentials of
    proxies blotted out, and of any other URL what stands before its ``@``."""
    found = sorted(set(_secrets()), key=lambda pair: len(pair[0]), reverse=True)
    for secret, name in found:
        text = text.replace(secret, f"<{name}>")
    return _USER_INFO.sub("<credentials>@", text)


def _secrets() -> Iterator[tuple[str, str]]:
    """Every secret as it may be written, with the variable's name."""
    for name in SECRETS:
        if secret := os.environ.get(name, "").strip():
            yield from _spellings(secret, name)
    for name in PROXIES:
        for value in (os.environ.get(name, ""), os.environ.get(name.lower(), "")):
            before, at, _ = value.strip().rpartition("@")
            if not at:
                continue
            credentials = before.rpartition("//")[2] if "//" in before[:10] else before
            yield from _spellings(credentials, f"credentials of {name}")
            password = credentials.partition(":")[2]
            if len(password) >= _SHORTEST:
                yield from _spellings(password, f"password of {name}")


def _spellings(secret: str, name: str) -> Iterator[tuple[str, str]]:
    """As given, as Python quotes it, and with and without percent signs."""
    spelled = {secret, repr(secret)[1:-1]}
    spelled |= {urllib.parse.quote(secret, safe=""), urllib.parse.unquote(secret)}
    yield from ((one, name) for one in spelled if one)
