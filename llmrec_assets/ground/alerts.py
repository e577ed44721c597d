"""Telling somebody outside that a run has failed: a webhook.

What belongs here: where alerts go, by the environment, and one HTTP POST. What does not: when there
is something to tell, and e-mail, which Dagster sends (``orchestration.alerts``); what no alert may
hold (``redaction``).

A webhook's URL is a secret: whoever knows it can post. It is in no message, log or error of this
module.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping

from llmrec_assets.ground.errors import LlmrecError

WEBHOOK = "LLMREC_ALERT_WEBHOOK"
#: Server (host, or host:port), sender, recipients (commas between) and password: e-mail alerts are
#: on when all are set.
EMAIL = (
    "LLMREC_ALERT_SMTP",
    "LLMREC_ALERT_EMAIL_FROM",
    "LLMREC_ALERT_EMAIL_TO",
    "LLMREC_ALERT_EMAIL_PASSWORD",
)

_LOCAL = {"localhost", "127.0.0.1", "::1"}
_TIMEOUT_S = (5, 10)


def webhook() -> str | None:
    """The URL that ``LLMREC_ALERT_WEBHOOK`` names, or None without it.

    Raises:
        LlmrecError: it is no https URL (http is for this machine alone). The URL is not shown.
    """
    url = os.environ.get(WEBHOOK, "").strip()
    if not url:
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        host = ""
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in _LOCAL)):
        raise LlmrecError(
            f"{WEBHOOK} is not a https:// URL (http:// is for localhost alone): no alert is sent"
        )
    return url


def post(url: str, alert: Mapping[str, object]) -> str | None:
    """Posts the alert as JSON; returns what went wrong, without the URL, or None.

    Never raises: whoever watches runs must go on watching.
    """
    host = urllib.parse.urlsplit(url).hostname
    try:
        import requests

        # A redirect could lead away from https.
        answer = requests.post(url, json=alert, timeout=_TIMEOUT_S, allow_redirects=False)
    except Exception as error:  # its text may hold the URL
        return f"the alert webhook at {host} cannot be reached ({type(error).__name__})"
    if answer.status_code >= 300:
        return f"the alert webhook at {host} answered {answer.status_code}"
    return None
