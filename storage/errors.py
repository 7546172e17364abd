"""What can be wrong with something stored, each naming the place and the remedy."""

from __future__ import annotations

import errno

import botocore.exceptions

from ddk.errors import UserError


class StoreError(UserError):
    """A store cannot be used as it is."""


class StoreMissingError(StoreError):
    """There is no complete store at the URL."""


class StoreDamagedError(StoreError):
    """Bytes of a store are missing, or are not those that were written."""


class FormatVersionError(StoreError):
    """Written by a newer version of the project than this one reads."""


class RunMismatchError(StoreError):
    """A run's folder holds another run than the one that is asked for."""


def explained(error: BaseException) -> StoreError | None:
    """What a storage service's refusal means for the person who runs this; None where it is something else.

    Looks through the chain of causes: file systems wrap what the service said.
    """
    seen: BaseException | None = error
    while seen is not None:
        message = _explanation(seen)
        if message is not None:
            return StoreError(message)
        seen = seen.__cause__ or seen.__context__
    return None


def _explanation(error: BaseException) -> str | None:
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
        return "no credentials for S3 were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, botocore.exceptions.EndpointConnectionError):
        return f"the S3 server does not answer ({error}); check AWS_ENDPOINT_URL and the network"
    if isinstance(error, PermissionError):
        return f"access denied ({error}); check the credentials, or the rights on that place"
    if isinstance(error, FileNotFoundError) and "bucket" in str(error).lower():
        return f"{error}; create the bucket, or correct the URL (root: s3://bucket/prefix)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space and run the same command again, it goes on where it stopped"
    return None
