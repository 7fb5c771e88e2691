r"""The text of an API key, and the slow hash of it that is all a database ever sees.

    qv_3kTz0aQ9LmXe_5Jd8…43 letters…u1_0aZ4kQ
    │  │            │                  └── CRC-32 of what stands before it: a typo is seen without asking anybody
    │  │            └── secret: 256 random bits
    │  └── id: finds the row, and may be shown
    └── prefix: tells people, and scanners for leaked secrets, what it is

Letters are base62, so that a double click takes the whole key. Scanners find it by
`\b[a-z]{2,8}_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}_[0-9A-Za-z]{6}\b`.
"""

import base64
import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

import bcrypt

LETTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID_LETTERS = 12
SECRET_LETTERS = 43
CHECK_LETTERS = 6
ROUNDS = 10
"""Cost of the hash, as a power of two. A secret of 256 bits needs no more: nobody guesses it."""
PREFIX = re.compile(r"[a-z]{2,8}")
_KEY = re.compile(
    rf"(?P<body>(?P<prefix>{PREFIX.pattern})_(?P<id>[0-9A-Za-z]{{{ID_LETTERS}}})_[0-9A-Za-z]{{{SECRET_LETTERS}}})"
    rf"_(?P<check>[0-9A-Za-z]{{{CHECK_LETTERS}}})"
)


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key as its owner holds it."""

    prefix: str
    id: str
    text: str = field(repr=False)


def mint(prefix: str) -> KeyText:
    """Make a new key."""
    key_id = "".join(secrets.choice(LETTERS) for _ in range(ID_LETTERS))
    secret = base62(secrets.randbits(256), SECRET_LETTERS)
    body = f"{prefix}_{key_id}_{secret}"
    return KeyText(prefix, key_id, f"{body}_{_check(body)}")


def parse(text: str) -> KeyText | None:
    """Take a key apart; None is what could not be one: of another form, or mistyped."""
    match = _KEY.fullmatch(text)
    if match is None or match["check"] != _check(match["body"]):
        return None
    return KeyText(match["prefix"], match["id"], text)


def hash_key(key: KeyText, *, rounds: int = ROUNDS) -> str:
    """Hash a key for the database; takes tens of milliseconds on purpose."""
    return bcrypt.hashpw(_digest(key), bcrypt.gensalt(rounds)).decode("ascii")


def matches(key: KeyText, hashed: str) -> bool:
    """Tell whether a hash is of this key; takes as long either way."""
    try:
        return bcrypt.checkpw(_digest(key), hashed.encode("ascii"))
    except ValueError:  # the row was changed by hand
        return False


def base62(number: int, width: int) -> str:
    """Write a number in base 62, with leading zeros."""
    letters = []
    for _ in range(width):
        number, digit = divmod(number, len(LETTERS))
        letters.append(LETTERS[digit])
    return "".join(reversed(letters))


def _digest(key: KeyText) -> bytes:
    # bcrypt reads 72 bytes and stops at a zero: 44 letters of base64 stand for the whole key.
    return base64.b64encode(hashlib.sha256(key.text.encode("ascii")).digest())


def _check(body: str) -> str:
    return base62(zlib.crc32(body.encode("ascii")), CHECK_LETTERS)
