"""URLs of files and folders: a local path, `file://`, `s3://` or anything else that fsspec opens.

A URL stays a `str` from the configuration to the last call: `pathlib.Path` would collapse the double slash of
`s3://`. Every small file of the project (manifests, records, checkpoints' states) is written through
`write_bytes`, which is atomic: a reader sees the old content, the new content or nothing, never half of it.

On S3 each function makes as many requests as it says (`docs/storage.md` has them in a table); what is retried stands in
`storage.files.s3`. What a service refuses after that is an `UnreachableError` of one line. Everything here may be
called from several threads at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ddk.redaction import holds_credentials
from storage.errors import StoreDamagedError, StoreError, UnreachableError, explained, is_beyond_the_end, unwritable
from storage.files import settings
from storage.files.names import plain_name
from storage.files.ranges import Range, cut, runs_of

if TYPE_CHECKING:
    from storage.files.s3 import S3

NO_CREDENTIALS = (
    "the address holds a password, key or signature, and would be stored and shown with it; take it out, and set "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or name a Prefect block (storage_block: …)"
)
PARTS = ".parts"
"""Ends the name of a folder beside a temporary file, where that one is put together."""
_AT_ONCE = 32
"""Requests in flight for one call; as many as `storage.files.s3` holds connections."""


def open_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind `url` and the path in it. Credentials and endpoint come from `storage.files.settings`.

    Raises:
        StoreError: there are credentials in the URL: it would be stored and shown with them.
    """
    if ("@" in url or "?" in url or "%" in url) and holds_credentials(url):
        raise StoreError(f"{url}: {NO_CREDENTIALS}")
    if "s3://" in url or "s3a://" in url:
        settings.prepare_s3()
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise StoreError(f"{protocol(url)}:// needs a package that is not installed ({error})") from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise StoreError(f"there is no protocol '{protocol(url)}://'; correct the URL") from None
    return fs, path


def protocol(url: str) -> str:
    """`'s3'` of `'s3://bucket'`, of a chained URL the first; '' of a local path."""
    found = re.match(r"([A-Za-z0-9+.-]+)(::|://)", url)
    return found[1] if found else ""


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """What a storage service refuses in here becomes an error of one line that begins with the URL.

    Raises:
        UnreachableError: no rights, no bucket, or no answer after all retries. A missing file stays a
            FileNotFoundError.
    """
    try:
        yield
    except FileExistsError:  # asked for, by `create_json`
        raise
    except Exception as error:
        known = None if is_local(url) else explained(error, url)
        if known is None:
            raise
        raise UnreachableError(str(known)) from error


def _is_s3(fs: fsspec.AbstractFileSystem) -> TypeGuard[S3]:
    return "s3" in fs.protocol


def is_local(url: str) -> bool:
    return isinstance(open_fs(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """`join('s3://bucket/data/', 'runs', 'a')` → `'s3://bucket/data/runs/a'`."""
    parts = tuple(part.strip("/") for part in parts)
    if url.endswith("://") or not url.rstrip("/"):  # `s3://` and `/` keep their slashes
        return url + "/".join(parts)
    return "/".join([url.rstrip("/"), *parts])


def name_of(url: str) -> str:
    """The last part of a URL: `'s3://bucket/data/math.zarr'` → `'math.zarr'`."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def lies_below(url: str, folder: str) -> bool:
    """Whether a file lies below the folder, also where symbolic links on its way are followed; elsewhere than on a
    local disk there are none."""
    if not is_local(folder):
        return True
    path, base = (os.path.realpath(open_fs(one)[1]) for one in (os.path.dirname(url), folder))
    return path == base or path.startswith(base.rstrip("/") + "/")


def absolute(url: str, base: str) -> str:
    """`url` itself where it names a protocol or an absolute path; else the path below the folder `base`.

    Example: `absolute('./data/../a', '/home/me')` → `'/home/me/a'`.
    """
    if "://" in url or "::" in url:
        return url
    url = os.path.expanduser(url)
    if "://" in base and not os.path.isabs(url):
        return join(base, url)
    return os.path.normpath(os.path.join(base, url))


def exists(url: str) -> bool:
    fs, path = open_fs(url)
    fs.invalidate_cache()
    with reaching(url):
        return bool(fs.exists(path))


def read_bytes(url: str) -> bytes | None:
    """The content, or None where there is no such file."""
    fs, path = open_fs(url)
    try:
        with reaching(url):
            return bytes(fs.cat_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_whole_many(urls: Sequence[str]) -> list[bytes | None]:
    """`read_bytes` of many files of one place, in their order; from an object store many at a time."""
    if not urls or is_local(urls[0]):
        return [read_bytes(url) for url in urls]
    fs = open_fs(urls[0])[0]
    paths = [open_fs(url)[1] for url in urls]
    contents = fs.cat_ranges(paths, None, None, on_error="return", **_at_once(fs))
    return [_found(url, content) for url, content in zip(urls, contents, strict=True)]


def _found(url: str, content: bytes | Exception) -> bytes | None:
    try:
        with reaching(url):
            if isinstance(content, Exception):
                raise content
    except FileNotFoundError:
        return None
    return bytes(content)


def _at_once(fs: fsspec.AbstractFileSystem) -> dict[str, Any]:
    return {"batch_size": _AT_ONCE} if fs.async_impl else {}


def read_range(url: str, start: int, length: int) -> bytes:
    """`read_ranges` of one range."""
    return read_ranges(url, [(start, length)])[0]


def read_ranges(url: str, ranges: Sequence[Range]) -> list[bytes]:
    """The bytes of each range, in their order; fewer where the file ends before.

    Ranges that touch or overlap are read as one; what remains, from an object store many at a time.

    Raises:
        FileNotFoundError: there is no such file.
    """
    runs, place = runs_of(ranges)
    contents = _read_runs(url, runs) if runs else []
    return [cut(contents[place[r]], runs[place[r]], r) if r[1] else b"" for r in ranges]


def _read_runs(url: str, runs: Sequence[Range]) -> list[bytes]:
    """From `start` on `length` bytes of each; where `start` is below 0, all to the end."""
    fs, path = open_fs(url)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:
            return [_read_local(file, start, length) for start, length in runs]
    starts = [start for start, _ in runs]
    ends = [start + length if start >= 0 else None for start, length in runs]
    contents = fs.cat_ranges([path] * len(runs), starts, ends, on_error="return", **_at_once(fs))
    return [_existing(url, content) for content in contents]


def _read_local(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start if start >= 0 else max(0, os.fstat(file.fileno()).st_size + start))
    return file.read(length)


def _existing(url: str, content: bytes | Exception) -> bytes:
    if not isinstance(content, Exception):
        return bytes(content)
    if is_beyond_the_end(content):
        return b""
    with reaching(url):
        raise content


def read_json(url: str) -> Any | None:
    """The parsed content, or None where there is no such file.

    Raises:
        StoreDamagedError: the file is not JSON (it is named).
    """
    content = read_bytes(url)
    return None if content is None else parsed(url, content)


def read_jsons(urls: Sequence[str]) -> list[Any | None]:
    """`read_json` of many files of one place; from an object store many at a time."""
    contents = zip(urls, read_whole_many(urls), strict=True)
    return [None if content is None else parsed(url, content) for url, content in contents]


def parsed(url: str, content: bytes) -> Any:
    """The JSON value in a file's content.

    Raises:
        StoreDamagedError: the content is not JSON (the file is named).
    """
    try:
        return json.loads(content)
    except ValueError as error:
        raise StoreDamagedError(f"{url} is not valid JSON ({error})") from None
    except RecursionError:
        raise StoreDamagedError(f"{url} is not valid JSON (it is nested too deeply)") from None


def write_bytes(url: str, content: bytes) -> None:
    """Write the whole file in one atomic step: a rename on a local disk, a single PUT on an object store.

    On S3, 128 MiB and more go up in parts of 64 MiB; nothing is to be seen before the last one is there.
    """
    fs, path = open_fs(url)
    if not isinstance(fs, LocalFileSystem):
        with reaching(url):
            fs.pipe_file(path, content)
        return
    with writing(url) as temporary, open(temporary, "wb") as file:
        file.write(content)


def write_json(url: str, value: Any) -> None:
    """Canonical form: sorted keys, so that equal values are equal bytes."""
    write_bytes(url, canonical(value))


def create_json(url: str, value: Any) -> bool:
    """`create_bytes` of JSON in its canonical form."""
    return create_bytes(url, canonical(value))


def create_bytes(url: str, content: bytes) -> bool:
    """`write_bytes` where there is no such file yet; of several who try at once, one succeeds.

    Returns:
        Whether the file now holds the content. Not, where another has written something else first.
    """
    fs, path = open_fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            temporary = f"{path}.{uuid.uuid4().hex}.tmp"
            try:
                with _put_down(url):
                    _begin(temporary)
                    with open(temporary, "wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                os.link(temporary, path)  # unlike a rename it never replaces a file
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        else:
            with reaching(url):
                fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        # It may be our own, where a PUT was answered too late and made again.
        return read_bytes(url) == content
    return True


def canonical(value: Any) -> bytes:
    """The bytes that `write_json` writes of a value."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def as_json(value: Any) -> Any:
    """Plain data as it comes back from a file: a tuple is a list."""
    return json.loads(json.dumps(value))


def list_names(url: str) -> list[str]:
    """Names of the files and folders directly below `url`, sorted; empty where there is no such folder.

    Temporary files of an interrupted `write_bytes` are left out.
    """
    fs, path = open_fs(url)
    fs.invalidate_cache()
    try:
        with reaching(url):
            entries = fs.names_below(path) if _is_s3(fs) else fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != path.rstrip("/")}
    return sorted(name for name in names if not name.endswith(".tmp"))


def size_of(url: str) -> int | None:
    """Bytes of the file, or None where there is none."""
    fs, path = open_fs(url)
    fs.invalidate_cache()
    try:
        with reaching(url):
            return fs.size_of(path) if _is_s3(fs) else int(fs.size(path))
    except FileNotFoundError:
        return None


def remove_tree(url: str) -> None:
    """Remove the folder and all below it; nothing where there is none."""
    fs, path = open_fs(url)
    fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError), reaching(url):
        if _is_s3(fs):
            fs.remove_below(path)
        else:
            fs.rm(path, recursive=True)


def remove_empty_folders(url: str) -> None:
    """Remove a local folder and those below it that hold no file; others have no folders."""
    fs, path = open_fs(url)
    if isinstance(fs, LocalFileSystem):
        for folder, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def remove_temporaries(url: str) -> None:
    """Remove what interrupted writes left below a local folder; nothing may be writing there. Others hold none."""
    fs, path = open_fs(url)
    if isinstance(fs, LocalFileSystem):
        for folder, below, names in os.walk(path):
            for name in names:
                if name.endswith(".tmp"):
                    os.unlink(os.path.join(folder, name))
            for name in [name for name in below if name.endswith(f".tmp{PARTS}")]:
                below.remove(name)
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def remove_file(url: str) -> None:
    """Remove one file; nothing where there is none."""
    fs, path = open_fs(url)
    with contextlib.suppress(FileNotFoundError), reaching(url):
        fs.rm_file(path)


def put_file(local: str, url: str) -> None:
    """Copy a local file, in one atomic step as `write_bytes` does; large ones never pass through memory whole."""
    fs, path = open_fs(url)
    if not isinstance(fs, LocalFileSystem):
        with reaching(url):
            fs.put_file(local, path)
        return
    with writing(url) as temporary:
        shutil.copyfile(local, temporary)


@contextlib.contextmanager
def writing(url: str) -> Iterator[str]:
    """A local path to write a file to, which is put at `url` in one atomic step when the context ends.

    On a local disk that path lies beside the file, so that a large one is written once only. Nothing changes at
    `url` where the context ends with an error.
    """
    fs, path = open_fs(url)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryDirectory(prefix="ddk-") as folder:
            local = os.path.join(folder, path.rsplit("/", 1)[-1])
            yield local
            put_file(local, url)
        return
    temporary = _temporary_beside(path)
    try:
        with _put_down(url):
            _begin(temporary)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _begin(temporary: str) -> None:
    """Create the file, empty, and the folders above it. From then on no folder above it is empty.

    Another process may remove one that has just been made, as it holds nothing yet (`remove_empty_folders`): it is made
    again.
    """
    for left in reversed(range(100)):
        try:
            os.makedirs(os.path.dirname(temporary), exist_ok=True)
            with open(temporary, "xb"):
                return
        except FileNotFoundError:
            if not left:
                raise
        except FileExistsError as error:
            # `makedirs` says so too where a folder that it met was gone when it looked what it is.
            if not left or _is_no_folder(str(error.filename)):
                raise


def _is_no_folder(path: str) -> bool:
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _temporary_beside(path: str) -> str:
    """A name in the same folder without the file's own in it: who watches the folder (TensorBoard takes every name with
    'tfevents', in order, and looks at none a second time) must not take it for the file."""
    return os.path.join(os.path.dirname(path), f"{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def _put_down(url: str) -> Iterator[None]:
    """What keeps a local file from being written in here becomes an error of one line that begins with its URL.

    Raises:
        UnreachableError: the disk is full or read-only, there are no rights, a folder of the path is a file, …
    """
    try:
        yield
    except UnreachableError:
        raise
    except OSError as error:
        known = unwritable(error)
        # Whoever writes may have read something else meanwhile.
        if known is None or (error.filename is not None and not _is_about(str(error.filename), open_fs(url)[1])):
            raise
        raise UnreachableError(f"{url} cannot be written: {known}") from error


def _is_about(name: str, path: str) -> bool:
    """Whether a name is that of the file, of a folder above it, or of a temporary one beside it."""
    beside = os.path.relpath(name, os.path.dirname(path)).split("/")[0]
    return name.startswith(path) or path.startswith(name.rstrip("/") + "/") or ".tmp" in beside


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[str | None]:
    """A local path with the file's content while the context lasts; the file itself where it is local already.

    None where there is no such file.
    """
    fs, path = open_fs(url)
    if isinstance(fs, LocalFileSystem):
        yield path if os.path.isfile(path) else None
        return
    with tempfile.TemporaryDirectory(prefix="ddk-") as folder:
        target = os.path.join(folder, path.rsplit("/", 1)[-1])
        try:
            with reaching(url):
                fs.get_file(path, target)
        except FileNotFoundError:
            yield None
        else:
            yield target


def put_folder(local: str, url: str) -> None:
    """Copy every file of a local folder (and of those below it), each atomically."""
    for folder, _, names in os.walk(local):
        for name in sorted(names):
            source = os.path.join(folder, name)
            put_file(source, join(url, os.path.relpath(source, local)))


@contextlib.contextmanager
def local_folder_copy(url: str) -> Iterator[str]:
    """A local folder with the files that lie directly in this one; the folder itself where it is local already.

    The copy is there while the context lasts. It is empty where there is no such folder.
    """
    fs, path = open_fs(url)
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    names = list_names(url)
    with tempfile.TemporaryDirectory(prefix="ddk-") as local, reaching(url):
        for name in names:
            fs.get_file(f"{path.rstrip('/')}/{name}", os.path.join(local, plain_name(name, url)))
        yield local
