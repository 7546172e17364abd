"""Removes from messages what they must not hold: keys, passwords, signatures, and control characters for a terminal.

Every error text for a person, a log or a stored file goes through `redacted`, because services repeat in their answers
what they were sent (an access key's id, a signature, a presigned address), and libraries repeat addresses.
`holds_credentials` finds credentials in an address that a user gives, so that it can be refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

HIDDEN = "***"
SHORTEST = 6
"""Letters of a value that is hidden wherever it stands. A shorter one could be any word."""

_PARAMETER = (
    r"(?:x-(?:amz|goog|oss)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid|ossaccesskeyid|"
    r"signature|sig|token|access[_-]?token|api[_-]?key|password|passwd|pwd|secret)"
)
_BEFORE_HOST = r"[^\s/@:?#'\"<>]*:(?![0-9]{1,5}(?:[/?#]|$))[^\s@'\"<>]*"
_USER = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]{{0,30}}://)(?:{_BEFORE_HOST})@")
"""Before the host, with a password. It may hold slashes, as AWS's secrets do."""
_TOKEN = re.compile(r"((?:https?|s3a?|gc?s)://)[^\s/@?#'\"<>]+@")
"""Before the host, alone. In other protocols that is the name of a user or of a container (abfs://)."""
_QUERY = re.compile(rf"([?&;]{_PARAMETER}=)[^&;\s'\"<>)]+", re.IGNORECASE)
_NAMED = re.compile(
    r"(?<!invalid)((?:aws_?)?(?:secret_?access_?key|access_?key_?id|session_?token)|signature_?provided|string_?to_?sign(?:_?bytes)?|"
    r"canonical_?request(?:_?bytes)?|x-amz-(?:security-token|credential|signature)|credential|signature|authorization|"
    r"api[_-]?key|password|passwd|secret|client_secret)"
    r"(\\?[\"']?\s*[=:>]\s*\\?[\"']?)(?:(?:bearer|basic|aws4-hmac-sha256|aws)\s+)?[^\s,;\"'<>&)}\]\\]+",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(access[ _-]?key(?:[ _-]?id)?\s*[:=]?\s*['\"`‘“])[A-Za-z0-9][^'\"`’”]*", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/=._~-]{16,}")
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA|AIDA|AROA|AGPA|ANPA|ANVA|ABIA|ACCA)[A-Z0-9]{8,}\b")
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS|AWS_ACCESS_KEY_ID|KEY_ID|AUTH_STRING)$"
)
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for line ends and tabs, what turns the direction of writing round, and half characters."""
_learnt: set[str] = set()


def hide(*values: object) -> None:
    """From now on hide these values wherever they stand; what is no text, or too short for that, is left."""
    _learnt.update(value for value in values if isinstance(value, str) and len(value) >= SHORTEST)


def redacted(text: str) -> str:
    """The text without what is secret, and without letters that a terminal would obey."""
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    for pattern, instead in _INSTEAD:
        text = pattern.sub(instead, text)
    return visible(text)


_INSTEAD = (
    (_USER, rf"\1{HIDDEN}@"),
    (_TOKEN, rf"\1{HIDDEN}@"),
    (_QUERY, rf"\1{HIDDEN}"),
    (_NAMED, rf"\1\2{HIDDEN}"),
    (_QUOTED, rf"\1{HIDDEN}"),
    (_BEARER, rf"\1 {HIDDEN}"),
    (_KEY_ID, HIDDEN),
)


def visible(text: str) -> str:
    """The text with a sign in place of each letter that a terminal or a browser would obey rather than show."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text)


def holds_credentials(url: str) -> bool:
    """Whether an address has a password, a token or a signature in it."""
    return "://" in url and any(
        pattern.search(form) is not None for pattern in (_USER, _TOKEN, _QUERY) for form in (url, unquote(url))
    )


def _secrets() -> Iterator[str]:
    """The longest first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _SECRET_VARIABLE.search(name)}
    yield from sorted(found | _learnt, key=len, reverse=True)
