"""What a log line must not hold: keys and passwords, whatever brought them there."""

import re
from collections.abc import Callable, Iterable
from typing import Any

MIN_SECRET = 6
"""Shorter ones are words: their masks would stand in the middle of others."""
_VALUE = r"[^\s\"'\\,)\]}\x1b]+"
_AROUND = r"(?:\\?['\"]|\x1b\[[0-9;]*m)*"
_PATTERNS = (
    (re.compile(r"([a-z]{2,8}_[0-9A-Za-z]{12})_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}"), r"\1_***"),  # the id may be shown
    (re.compile(rf"(?i)(bearer|basic)\s+{_VALUE}"), r"\1 ***"),
    (
        re.compile(
            rf"(?i)((?:authorization|x-api-key|api-key){_AROUND}\s*[:=,]\s*(?:b(?=['\"]))?{_AROUND})"
            rf"(?!(?:bearer|basic)\b){_VALUE}"
        ),
        r"\1***",
    ),
    (re.compile(r"([a-z][a-z0-9+.-]{0,20}://[^\s:/@]*):[^\s/@]+@"), r"\1:***@"),
)
"""What a key, the value of a header that brings one, and the password of a URL look like, in plain text, in JSON and in colours."""


def redactor(secrets: Iterable[str] = ()) -> Callable[[str], str]:
    """Return what masks keys in a text: all that look like one, and the given ones."""
    given = sorted({secret for secret in secrets if len(secret) >= MIN_SECRET}, key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, given))) if given else None

    def redact(text: str) -> str:
        masked = known.sub("***", text) if known else text
        for pattern, mask in _PATTERNS:
            masked = pattern.sub(mask, masked)
        return masked

    return redact


def processor(redact: Callable[[str], str]) -> Callable[[Any, str, Any], str]:
    """Return the last step of a log line: it comes after the renderer, so that nothing is written behind it."""
    return lambda _logger, _name, line: redact(str(line))
