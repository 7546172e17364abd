"""Errors of stored data; each names the place and the remedy."""

from __future__ import annotations

import errno
import os
import re

import botocore.exceptions

from ddk.errors import UserError
from ddk.redaction import redacted


class StoreError(UserError):
    """A store cannot be used as it is."""


class StoreMissingError(StoreError):
    """There is no complete store at the URL."""


class StoreDamagedError(StoreError):
    """Bytes of a store are missing or have changed since they were written."""


class FormatVersionError(StoreError):
    """Written by a newer version of the project than this one reads."""


class RunMismatchError(StoreError):
    """A run's folder holds another run than the one that is asked for."""


class UnreachableError(OSError):
    """A storage service refused, or did not answer; the message names place, cause and remedy.

    No `StoreError`, so that nobody takes it for damage: what is stored may be sound. `explained` makes it one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class PassingError(UnreachableError):
    """One that another process has met and found transient (`is_transient`)."""


_AGAIN = "run the same command again later to resume"
_RIGHTS = "check the credentials, or the rights on that place"
_BREAKS = (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError)
_OTHER_REGION = {"301", "307", "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}
_NO_OBJECT = {"404", "NoSuchKey", "NoSuchVersion"}


def explained(error: BaseException, place: str | None = None) -> StoreError | None:
    """What a storage service's refusal means for the person who runs this; None where it is something else.

    Looks through the chain of causes: file systems wrap what the service said.

    Args:
        place: URL that was asked for; the message begins with it.
    """
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UnreachableError):
            return StoreError(str(seen))
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    # What a service said comes first: s3fs makes an OSError of it whose number (EIO, say) is a disk's.
    of_services = [
        one for one in chain if isinstance(one, botocore.exceptions.ClientError | botocore.exceptions.BotoCoreError)
    ]
    for one in (*of_services, *chain):
        if (message := _explanation(one)) is not None:
            return StoreError(f"{place}: {message}" if place else message)
    return None


_PASSING = {errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ESTALE}
"""Of network file systems too. EIO is left out: a disk that fails goes on failing."""
_PASSING_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling"}


def is_transient(error: BaseException) -> bool:
    """Whether storage may give what was asked for a little later: no answer, too many requests, an error of its own.

    Looks through the chain of causes, as `explained` does.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PassingError):
            return True
        if isinstance(seen, botocore.exceptions.ClientError):
            status = seen.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status == 429 or status >= 500 or _code(seen) in _PASSING_CODES
        if isinstance(seen, _BREAKS) or type(seen).__name__ == "ClientPayloadError":  # aiohttp's
            return True
        if isinstance(seen, OSError) and seen.errno in _PASSING:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_beyond_the_end(error: BaseException) -> bool:
    """Whether S3 says that the object ends before the bytes that were asked for."""
    cause = error.__cause__
    return isinstance(cause, botocore.exceptions.ClientError) and _code(cause) in ("InvalidRange", "416")


_CLIENTS = ("aiohttp.client_exceptions", "requests.exceptions")
"""Of what opens http:// and the like; by name, as they may not be installed."""


def _explanation(error: BaseException) -> str | None:
    if type(error).__module__ in _CLIENTS and type(error).__name__ != "ClientPayloadError":
        return f"the server does not answer ({_one_line(error)[:200]}); check the URL and the network"
    if (
        isinstance(error, botocore.exceptions.BotoCoreError) or type(error).__name__ == "ClientPayloadError"
    ):  # aiohttp's
        return _no_answer(error)
    if isinstance(error, botocore.exceptions.ClientError):
        return _refusal(error)
    if isinstance(error, PermissionError) and not isinstance(error.__cause__, botocore.exceptions.ClientError):
        return f"access denied ({error}); {_RIGHTS}"
    return _of_the_machine(error)


_GOES_ON = "run the same command again to resume"
_REMEDIES = {
    errno.ENOSPC: f"the disk is full; free some space and {_GOES_ON}",
    errno.EDQUOT: f"the quota of this disk is used up; free some space and {_GOES_ON}",
    errno.EFBIG: f"the file is larger than this process may write; raise the limit (ulimit -f) and {_GOES_ON}",
    errno.EROFS: "the disk is read-only; mount it for writing, or name another place",
    errno.EIO: f"the disk reports an error; look at its state (dmesg), and {_GOES_ON}",
    errno.EMFILE: f"this process may open no more files; raise the limit (ulimit -n) and {_GOES_ON}",
    errno.ENFILE: f"this machine may open no more files; end other programs and {_GOES_ON}",
    errno.ENOMEM: f"there is not enough memory; end other programs and {_GOES_ON}",
    errno.ENAMETOOLONG: "the name is too long for this disk; shorten it",
    errno.ELOOP: "the links of this path lead in a circle; correct them",
}
"""What a machine says wherever a file is read or written."""
_WHERE_WRITTEN = {
    errno.ENOENT: "no folder can be made there; name another place",
    errno.ENOTDIR: "a part of this path is a file; name another place, or remove the file",
    errno.EEXIST: "a part of this path is a file; name another place, or remove the file",
    errno.EISDIR: "there is a folder of this name; remove it, or name another place",
    errno.EACCES: f"access denied; {_RIGHTS}",
    errno.EPERM: f"access denied; {_RIGHTS}",
    errno.EINVAL: "this disk takes no file of this name; name another place",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def unwritable(error: OSError) -> str | None:
    """Why a local file could not be written, and the remedy; None where it is nothing that a person can put right."""
    number = error.errno or 0
    return _REMEDIES.get(number) or _WHERE_WRITTEN.get(number)


def os_error_of(error: BaseException) -> OSError | None:
    """The error of the operating system that a library of Rust (safetensors, tokenizers) has put into words."""
    found = None if isinstance(error, OSError) else _OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _of_the_machine(error: BaseException) -> str | None:
    known = error if isinstance(error, OSError) else os_error_of(error)
    if known is None or (message := _REMEDIES.get(known.errno or 0)) is None:
        return None
    return f"{known.filename}: {message}" if known.filename is not None else message


def _no_answer(error: BaseException) -> str | None:
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or name a Prefect block"
        return f"no credentials for S3 were found; {remedy} (storage_block: …)"
    if isinstance(error, botocore.exceptions.ProfileNotFound):
        return f"{_one_line(error)}; correct AWS_PROFILE"
    if isinstance(error, botocore.exceptions.EndpointConnectionError):
        return f"the S3 server does not answer ({_one_line(error)}); check AWS_ENDPOINT_URL and the network"
    if isinstance(error, _BREAKS) or not isinstance(error, botocore.exceptions.BotoCoreError):
        return f"the connection to the S3 server broke again and again ({_one_line(error)}); {_AGAIN}"
    return None


def _refusal(error: botocore.exceptions.ClientError) -> str | None:
    code, metadata = _code(error), error.response.get("ResponseMetadata", {})
    if code in _NO_OBJECT:
        return None
    if code == "NoSuchBucket":
        return "there is no such bucket; create it, or correct the URL (s3://bucket/prefix)"
    cause, remedy = _cause_and_remedy(code, metadata.get("HTTPStatusCode", 0))
    times = f" {metadata['RetryAttempts'] + 1} times" if metadata.get("RetryAttempts") else ""
    return f"{cause}{times} ({code}: {_one_line(error.response['Error'].get('Message', ''))}); {remedy}"


def _cause_and_remedy(code: str, status: int) -> tuple[str, str]:
    if status == 429 or status >= 500 or code in _PASSING_CODES:
        return f"the S3 server answered {status}", _AGAIN
    if code in _OTHER_REGION:
        return "the bucket lies in another region", "set AWS_REGION to its region"
    if code == "RequestTimeTooSkewed":
        return "the S3 server refuses this machine's clock", "set the clock"
    if status == 403 or code == "ExpiredToken":
        return "access denied", _RIGHTS
    return "the S3 server refused the request", "check the URL and the settings of S3"


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response["Error"].get("Code", ""))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
