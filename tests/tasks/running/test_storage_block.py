"""Credentials that lie in a Prefect block and nowhere else: a real Prefect server, a real S3 server."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.filesystems import RemoteFileSystem
from s3_proxy import S3Proxy
from small_run import Ddk, write_config

from ddk.errors import UserError
from storage.files import settings, uri
from tasks.running.storage_block import use_storage_block

pytestmark = pytest.mark.usefixtures("prefect_server")
SECRET = "do-not-show-this-anywhere"  # noqa: S105


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """Before the S3 server; the environment knows neither it nor any credentials."""
    with S3Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name)
        yield proxy
        settings.use_options("s3", {})


def options(proxy: S3Proxy, key: str, secret: str = SECRET) -> dict[str, object]:
    region = {"region_name": "eu-central-1"}
    return {"key": key, "secret": secret, "endpoint_url": proxy.url, "client_kwargs": region}


def test_a_secret_block_opens_the_storage(proxy: S3Proxy, s3_server: str, caplog: pytest.LogCaptureFixture) -> None:
    Secret(value=json.dumps(options(proxy, "by-secret"))).save("my-s3")
    with caplog.at_level(logging.DEBUG):
        use_storage_block("my-s3")
        uri.write_bytes(f"{s3_server}/block", b"x")
        assert uri.read_bytes(f"{s3_server}/block") == b"x"
    assert {request.access_key for request in proxy.requests} == {"by-secret"}
    assert "storage: s3 is opened with the Prefect block 'my-s3'" in caplog.text
    assert SECRET not in caplog.text
    assert "in clear" not in caplog.text
    use_storage_block(None)
    assert uri.read_bytes(f"{s3_server}/block") == b"x", "None changes nothing"


def test_a_remote_file_system_does_as_well(proxy: S3Proxy, s3_server: str) -> None:
    RemoteFileSystem(basepath="s3://ddk-tests/any", settings=options(proxy, "by-remote", "shown")).save("shared")
    Secret(value=json.dumps(options(proxy, "by-secret"))).save("shared")
    for name, key in (
        ("remote-file-system/shared", "by-remote"),
        ("shared", "by-secret"),
        ("secret/shared", "by-secret"),
    ):
        proxy.forget()
        use_storage_block(name)
        uri.read_bytes(f"{s3_server}/none")
        assert [request.access_key for request in proxy.requests] == [key]


def test_what_prefect_shows_in_clear_is_pointed_out(proxy: S3Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Prefect 3.7 obscures a Secret that is text, and no other."""
    Secret(value=options(proxy, "by-dict", "shown")).save("clear")
    use_storage_block("clear")
    assert "Prefect shows the content of the block 'clear' in plain text" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not-there", r"^Prefect has no block 'not-there' \(storage_block\); save one: Secret\(value=.*\.save\(\"not"),
        ("secret/not-there", r"^Prefect has no block 'secret/not-there'"),
        ("json/some", r"^storage_block: 'json/some' has an unsupported type; it may be secret or remote-file-system"),
        ("a-password", r"^the Prefect block 'a-password' \(storage_block\) holds no JSON object of s3fs's options"),
        ("misspelt", r"^the Prefect block 'misspelt' \(storage_block\): s3 has no option sekret; there are .*secret"),
    ],
)
def test_a_block_that_will_not_do_is_named(name: str, message: str) -> None:
    Secret(value=SECRET).save("a-password", overwrite=True)
    Secret(value=json.dumps({"key": "x", "sekret": SECRET})).save("misspelt", overwrite=True)
    with pytest.raises(UserError, match=message) as caught:
        use_storage_block(name)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_run_has_its_credentials_from_the_block_and_shows_them_nowhere(
    proxy: S3Proxy, s3_server: str, prefect_server: str, tmp_path: Path
) -> None:
    Secret(value=json.dumps(options(proxy, "by-run"))).save("run-s3")
    root = f"{s3_server}/packed"
    only_math = {"code": None, "zh_books": None}
    config = write_config(tmp_path, root=root, storage_block="run-s3", domains=only_math)
    done = Ddk(tmp_path / "prefect", prefect_server).process("--debug", "pack", config)
    assert done.code == 0, done.err
    assert "storage: s3 is opened with the Prefect block 'run-s3'" in done.err
    assert {request.access_key for request in proxy.requests} == {"by-run"}
    use_storage_block("run-s3")
    assert len(uri.list_names(f"{root}/blocks")) == 1
    stored = [content for content in _files(root) if SECRET.encode() in content]
    assert stored == []
    for text in (done.out, done.err, *_known_to_prefect(prefect_server)):
        assert SECRET not in text, text[max(0, text.find(SECRET) - 700) : text.find(SECRET) + 100]


def _files(url: str) -> Iterator[bytes]:
    fs, path = uri.open_fs(url)
    for found in fs.find(path):
        yield fs.cat_file(found)


def _known_to_prefect(api_url: str) -> list[str]:
    """What the server shows of runs, their parameters and logs, artifacts and blocks."""
    shown = []
    for what in ("flow_runs", "task_runs", "logs", "artifacts", "block_documents"):
        answer = httpx.post(f"{api_url}/{what}/filter", json={}, timeout=30)
        answer.raise_for_status()
        assert answer.json() or what == "artifacts", what
        shown.append(answer.text)
    return shown
