"""URLs of files and folders: a local path, `file://`, `s3://` or anything else that fsspec opens.

A URL stays a `str` from the configuration to the last call: `pathlib.Path` would collapse the double slash of
`s3://`. Every small file of the project (manifests, records, checkpoints' states) is written through
`write_bytes`, which is atomic: a reader sees the old content, the new content or nothing, never half of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import StoreDamagedError


def open_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind `url` and the path in it. Credentials and endpoint come from the environment."""
    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def is_local(url: str) -> bool:
    return isinstance(open_fs(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """`join('s3://bucket/root/', 'runs', 'a')` → `'s3://bucket/root/runs/a'`."""
    parts = tuple(part.strip("/") for part in parts)
    if url.endswith("://") or not url.rstrip("/"):  # `s3://` and `/` keep their slashes
        return url + "/".join(parts)
    return "/".join([url.rstrip("/"), *parts])


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
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes | None:
    """The content, or None where there is no such file."""
    fs, path = open_fs(url)
    try:
        return bytes(fs.cat_file(path, **whole_file_options(fs)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def whole_file_options(fs: fsspec.AbstractFileSystem) -> dict[str, Any]:
    """What makes s3fs read a file in one request; it would ask for the size first, if need be of a stale listing."""
    return {"max_concurrency": 1} if "s3" in fs.protocol else {}


def read_json(url: str) -> Any | None:
    """The parsed content, or None where there is no such file.

    Raises:
        StoreDamagedError: the file is not JSON (it is named).
    """
    return _parsed(url, read_bytes(url))


def read_jsons(urls: Sequence[str]) -> list[Any | None]:
    """`read_json` of many files of one place; from an object store many at a time."""
    if not urls or is_local(urls[0]):
        return [read_json(url) for url in urls]
    fs = open_fs(urls[0])[0]
    contents = fs.cat_ranges([open_fs(url)[1] for url in urls], None, None, on_error="return", **whole_file_options(fs))
    found: list[Any | None] = []
    for url, content in zip(urls, contents, strict=True):
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise content
        found.append(_parsed(url, None if isinstance(content, Exception) else content))
    return found


def _parsed(url: str, content: bytes | None) -> Any | None:
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError as error:
        raise StoreDamagedError(f"{url} is not valid JSON ({error})") from None


def write_bytes(url: str, content: bytes) -> None:
    """Write the whole file in one atomic step: a rename on a local disk, a single PUT on an object store."""
    fs, path = open_fs(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    with writing(url) as temporary, open(temporary, "wb") as file:
        file.write(content)


def write_json(url: str, value: Any) -> None:
    """Canonical form: sorted keys, so that equal values are equal bytes."""
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def list_names(url: str) -> list[str]:
    """Names of the files and folders directly below `url`, sorted; empty where there is no such folder.

    Temporary files of an interrupted `write_bytes` are left out.
    """
    fs, path = open_fs(url)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != path.rstrip("/")}
    return sorted(name for name in names if not name.endswith(".tmp"))


def size_of(url: str) -> int | None:
    """Bytes of the file, or None where there is none."""
    fs, path = open_fs(url)
    fs.invalidate_cache()
    try:
        return int(fs.size(path))
    except FileNotFoundError:
        return None


def remove_tree(url: str) -> None:
    """Remove the folder and all below it; nothing where there is none."""
    fs, path = open_fs(url)
    fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def remove_temporaries(url: str) -> None:
    """Remove what interrupted writes left below a local folder; nothing may be writing there. Others hold none."""
    fs, path = open_fs(url)
    if isinstance(fs, LocalFileSystem):
        for folder, _, names in os.walk(path):
            for name in names:
                if name.endswith(".tmp"):
                    os.unlink(os.path.join(folder, name))


def remove_file(url: str) -> None:
    """Remove one file; nothing where there is none."""
    fs, path = open_fs(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def put_file(local: str, url: str) -> None:
    """Copy a local file, in one atomic step as `write_bytes` does; large ones never pass through memory whole."""
    fs, path = open_fs(url)
    if not isinstance(fs, LocalFileSystem):
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
            fs.put_file(local, path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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
