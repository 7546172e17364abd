"""S3 as this project uses it: s3fs, with one layer of retries and a known number of requests.

By itself s3fs 2026.9 stacks three layers of retries: botocore's within its own, within that of reading a body. A
persistent error is then asked for 5 times (500), 25 times (SlowDown) or 250 times (a connection that is dropped while
reading), the first and the last without a bound on time that a person would wait for. Here it is one:

- **A request** is made up to 8 times by botocore, which waits a random share of 1, 2, 4, … 64 s in between: for 429,
  every 5xx, connections that are refused, dropped or reset, and read timeouts. Other 4xx are final at once. When the
  server answers at once, that is about a minute; when it is silent, three to four.
- **A body** that breaks off is read again up to 5 times by s3fs, which begins with a request anew.
- **A deadline** covers all of that, in whatever phase a server falls silent (`storage.files.deadlines`).

botocore's mode is `legacy`: its newer `standard` mode shares a quota of 100 retries among all requests of a client, so
that of 300 concurrent reads which the server turns away twice each, most are given up. AWS_MAX_ATTEMPTS and
AWS_RETRY_MODE replace these.
"""

from __future__ import annotations

import os
from typing import Any

import botocore.exceptions
import botocore.parsers
import s3fs
from fsspec.asyn import sync_wrapper
from s3fs.errors import translate_boto_error

from storage.files import deadlines

ATTEMPTS = 8
"""Of one request, by botocore."""
AT_ONCE = 32
"""Connections to the server, and so requests in flight."""
PART_BYTES = 64 << 20
"""Of a multipart upload. Content of twice as much and more is uploaded in such parts, less in one PUT."""
PARTS_AT_ONCE = 4
"""Uploaded concurrently; they are held in memory."""
_MAX_PARTS = 10_000
_MAX_KEYS = 1_000
"""That one request deletes."""

_FINAL = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.parsers.ResponseParserError,
    TimeoutError,
)


class S3(s3fs.S3FileSystem):  # type: ignore[misc]
    """See the module. Registered for `s3://` by `storage.files.settings`."""

    retries = 5
    """Of a body that breaks off."""

    def __init__(self, *args: Any, use_listings_cache: bool = False, **kwargs: Any) -> None:
        # A listing that one thread fills would be taken for the present by another.
        super().__init__(*args, use_listings_cache=use_listings_cache, **kwargs)
        if region := os.environ.get("AWS_REGION"):  # botocore knows AWS_DEFAULT_REGION alone
            self.client_kwargs: dict[str, Any] = {"region_name": region, **self.client_kwargs}

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        retries: dict[str, Any] = {}
        if "AWS_RETRY_MODE" not in os.environ:
            retries["mode"] = "legacy"
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            retries["total_max_attempts"] = ATTEMPTS
        return {
            "max_pool_connections": AT_ONCE,
            "http_session_cls": deadlines.Session,
            **super()._prepare_config_kwargs(),
            "retries": {**retries, **self.config_kwargs.get("retries", {})},
        }

    async def _call_s3(self, method: str, *parts: Any, **arguments: Any) -> Any:
        await self.set_session()
        call = getattr(await self.get_s3(arguments.get("Bucket")), method)
        given = self._get_s3_method_kwargs(call, *parts, **arguments)
        try:
            async with deadlines.answered(f"{method} of {given.get('Bucket')}", deadlines.size_of(given.get("Body"))):
                answer = await call(**given)
            if method == "get_object":
                deadlines.close_in_time(answer["Body"], answer.get("ContentLength") or 0)
            return answer
        except botocore.exceptions.ClientError as error:
            if error.response["Error"].get("Code") in ("PreconditionFailed", "ConditionalRequestConflict"):
                # Of a PUT that is to create: there is such an object, or another is just being put there.
                raise FileExistsError(str(error)) from None
            translated = translate_boto_error(error)
            if not isinstance(translated, _FINAL):
                raise translated from error
            raise ConnectionError(str(error)) from error
        except _FINAL as error:
            # Of a kind that s3fs does not take for a reason to make the request another 5 times, all 8 attempts each.
            raise ConnectionError(str(error)) from error

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(self, path: str, **kwargs: Any) -> bytes:
        # One request; s3fs would ask for the size first, to read a large object by several.
        with deadlines.one_request():
            return bytes(await super()._cat_file(path, **{"max_concurrency": 1, **kwargs}))

    async def _pipe_file(self, path: str, data: bytes, **kwargs: Any) -> Any:
        return await super()._pipe_file(path, data, **_parts(len(data)), **kwargs)

    async def _put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        await super()._put_file(lpath, rpath, **_parts(os.path.getsize(lpath)), **kwargs)

    async def _get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        # One request, which goes on where it broke off; several at once would each fail for good.
        with deadlines.one_request():
            await super()._get_file(rpath, lpath, **{"max_concurrency": 1, **kwargs})

    async def _names_below(self, path: str) -> list[str]:
        """Paths directly below a folder, one request for each 1,000. Unlike `ls` it never lists the parent as well."""
        return [entry["name"] for entry in await self._lsdir(path.rstrip("/"))]

    names_below = sync_wrapper(_names_below)

    async def _entries_below(self, path: str) -> list[dict[str, Any]]:
        """Every object below a folder, with size and time: one request for each 1,000."""
        try:
            return list(await self._lsdir(path.rstrip("/"), delimiter=""))
        except FileNotFoundError:
            return []

    entries_below = sync_wrapper(_entries_below)

    async def _size_of(self, path: str) -> int | None:
        """Bytes of an object, or None where there is none: one request."""
        bucket, key, _ = self.split_path(path)
        try:
            return int((await self._call_s3("head_object", Bucket=bucket, Key=key))["ContentLength"])
        except FileNotFoundError:
            return None

    size_of = sync_wrapper(_size_of)

    async def _remove_below(self, path: str) -> None:
        """Remove all objects below a folder: one request to list and one to delete for each 1,000.

        Unlike `rm` it takes `*` and `?` in a name for what they are, and says what could not be deleted.
        """
        found = [self.split_path(entry["name"]) for entry in await self._lsdir(path.rstrip("/"), delimiter="")]
        for first in range(0, len(found), _MAX_KEYS):
            keys = [{"Key": key} for _, key, _ in found[first : first + _MAX_KEYS]]
            delete = {"Objects": keys, "Quiet": True}
            answer = await self._call_s3("delete_objects", Bucket=found[0][0], Delete=delete)
            if errors := answer.get("Errors"):
                refusal = botocore.exceptions.ClientError({"Error": errors[0], **answer}, "DeleteObjects")
                raise translate_boto_error(refusal) from refusal

    remove_below = sync_wrapper(_remove_below)


def _parts(size: int) -> dict[str, int]:
    return {"chunksize": max(PART_BYTES, -(-size // _MAX_PARTS)), "max_concurrency": PARTS_AT_ONCE}
