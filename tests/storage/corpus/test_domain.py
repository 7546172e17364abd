from __future__ import annotations

import os
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from ddk.errors import UserError
from storage.corpus.documents import Text, iter_documents
from storage.corpus.domain import DomainConfig, domain_seed, in_validation
from storage.corpus.files import CorpusFile, Fields, resolve_files


def put(path: Path, content: bytes) -> CorpusFile:
    path.write_bytes(content)
    return CorpusFile(url=str(path), name=path.name, size=len(content))


# Configuration


def test_a_single_pattern_may_be_a_plain_string() -> None:
    config = DomainConfig.model_validate({"train": "a/*.jsonl", "validation": "b.txt"})
    assert (config.train, config.validation, config.text_field) == (["a/*.jsonl"], ["b.txt"], "text")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": "a.txt"}, "and neither is given: name validation files"),
        ({"train": "a.txt", "validation": "b.txt", "validation_fraction": 0.1}, "and both are given"),
        ({"train": "a.txt", "validation_fraction": 1.0}, "less than 1"),
        ({"train": [], "validation_fraction": 0.1}, "at least 1 item"),
        ({"train": "a.txt", "validation_fraction": 0.1, "field": "x"}, "Extra inputs"),
        ({"train": "a.txt", "validation_fraction": 0.1, "max_train_blocks": 0}, "greater than or equal to 1"),
        ({"train": "a.jsonl", "validation_fraction": 0.1, "prompt_field": ""}, "at least 1 character"),
        (
            {"train": "a.jsonl", "validation_fraction": 0.1, "prompt_field": "text"},
            "prompt_field and text_field are both 'text'; text_field names what follows the prompt",
        ),
        (
            {"train": "a.jsonl", "validation_fraction": 0.1, "prompt_field": "prompt", "targets": "topk"},
            "prompt_field applies only to documents, and targets: topk takes rows of tokens",
        ),
        ({"train": "a.jsonl", "validation_fraction": 0.1, "path_depth": 1}, "path_depth needs path_field"),
        ({"train": "a.jsonl", "validation_fraction": 0.1, "path_field": "a", "path_depth": 0}, "greater than or equal"),
        (
            {"train": "a.jsonl", "validation_fraction": 0.1, "path_field": "text"},
            "path_field and text_field are both 'text'; each is a field of its own",
        ),
        (
            {"train": "a.jsonl", "validation_fraction": 0.1, "path_field": "a", "prompt_field": "a"},
            "path_field and prompt_field are both 'a'",
        ),
        (
            {"train": "a.jsonl", "validation_fraction": 0.1, "path_field": "topic", "targets": "distillkit"},
            r"path_field applies only to documents, and targets: distillkit takes rows of tokens; "
            r".*\(such as math/algebra\)",
        ),
    ],
)
def test_a_wrong_configuration_says_why(values, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DomainConfig.model_validate(values)


def test_each_field_has_a_description() -> None:
    for name, field in DomainConfig.model_json_schema()["properties"].items():
        assert field.get("description"), name


# Listing


def test_files_are_sorted_and_come_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.txt"):
        put(tmp_path / name, b"123")
    (tmp_path / "folder.jsonl").mkdir()
    files = resolve_files([f"{tmp_path}/c.txt", f"{tmp_path}/*.jsonl*", f"file://{tmp_path}/b.jsonl"], "web")
    assert [file.name for file in files] == ["a.jsonl.gz", "b.jsonl", "c.txt"]
    assert files[1] == CorpusFile(url=f"{tmp_path}/b.jsonl", name="b.jsonl", size=3)


def test_relative_paths_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "part[1].TXT", b"x")
    monkeypatch.chdir(tmp_path)
    assert [file.url for file in resolve_files(["part[1].TXT"], "web")] == [f"{tmp_path}/part[1].TXT"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.jsonl", r"domain 'web', pattern '.*none-\*.jsonl' matches no file; check the path"),
        ("none.jsonl", r"domain 'web', pattern '.*none.jsonl' matches no file"),
        ("", r"names a folder; name the files in it, for example '.*/\*.jsonl'"),
        ("notes.md", r"domain 'web': .*notes.md has an unknown suffix; accepted are .jsonl, .json .* or .parquet"),
        ("*.parquet.gz", r"a.parquet.gz has an unknown suffix"),
    ],
)
def test_what_cannot_be_listed_is_named(tmp_path: Path, pattern: str, message: str) -> None:
    put(tmp_path / "notes.md", b"x")
    put(tmp_path / "a.parquet.gz", b"x")
    with pytest.raises(UserError, match=message):
        resolve_files([f"{tmp_path}/{pattern}"], "web")


def test_a_prompt_needs_files_that_have_fields(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.parquet", "c.txt.gz"):
        put(tmp_path / name, b"x")
    fields = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.parquet"]
    assert len(resolve_files(fields, "chat", Fields(prompt="prompt"))) == 2
    assert len(resolve_files([f"{tmp_path}/*"], "chat")) == 3
    message = r"domain 'chat': .*c\.txt\.gz holds plain text, which has no field 'prompt'; .* leave it out, or put"
    with pytest.raises(UserError, match=message):
        resolve_files([f"{tmp_path}/*"], "chat", Fields(prompt="prompt"))
    with pytest.raises(UserError, match=r"c\.txt\.gz holds plain text, which has no field 'topic'; path_field goes"):
        resolve_files([f"{tmp_path}/*"], "chat", Fields(path="topic"))


def test_an_unknown_protocol_and_a_chained_glob_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pattern 'nope://a.txt' cannot be listed: there is no protocol 'nope://'"):
        resolve_files(["nope://a.txt"], "web")
    with pytest.raises(UserError, match=r"none.zip' cannot be listed"):
        resolve_files([f"zip://a.txt::{tmp_path}/none.zip"], "web")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "zipped")
    (file,) = resolve_files([f"zip://a.txt::{tmp_path}/a.zip"], "web")
    assert list(iter_documents(file, Fields())) == [Text(0, "zipped", "")]
    with pytest.raises(UserError, match="a chained URL"):
        resolve_files([f"zip://*.txt::{tmp_path}/a.zip"], "web")


def test_links_are_followed_and_what_is_no_file_is_named(tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    put(tmp_path / "blob", b"123")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blob")
    (linked,) = resolve_files([f"{tmp_path}/*.jsonl"], "web")
    assert (linked.name, linked.size) == ("a.jsonl", 3)
    os.mkfifo(tmp_path / "p.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.txt"))
        for pattern, kind in (("p.jsonl", "a named pipe"), ("*.jsonl", "a named pipe"), ("s.txt", "a socket")):
            with pytest.raises(
                UserError, match=rf"pattern '.*': /.* is {kind}, which cannot be read twice; store it as"
            ):
                resolve_files([f"{tmp_path}/{pattern}"], "web")
    with pytest.raises(UserError, match="/dev/null is a device, which cannot be read twice"):
        resolve_files(["/dev/null"], "web")


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(int(self.path.strip("/").split(".")[0]))

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for code in (403, 500):
            with pytest.raises(
                UserError, match=rf"pattern '.*': its server does not answer, or refuses \({code}, .*\); ch"
            ):
                resolve_files([f"{url}/{code}.jsonl"], "web")
        with pytest.raises(UserError, match="matches no file"):
            resolve_files([f"{url}/404.jsonl"], "web")
        server.shutdown()
    for pattern in (f"{url}/a.jsonl", f"{url}/*.jsonl"):
        with pytest.raises(
            UserError, match=r"pattern '.*'(: its server does not answer| cannot be listed).*[Cc]onnect"
        ):
            resolve_files([pattern], "web")


def test_files_on_s3(s3_server: str) -> None:
    root, names = f"{s3_server}/corpus", ["a.jsonl.zst", "b/c.jsonl.gz", "d.parquet", "e/f.txt"]
    fs = fsspec.filesystem("s3")
    for size, name in enumerate(names, 1):
        fs.pipe_file(f"{root}/{name}", bytes(size))
    files = resolve_files([f"{root}/e/f.txt", f"{root}/**/*.gz", f"{root}/*.*"], "web")
    assert [file.url for file in files] == [f"{root}/{name}" for name in names]
    assert [file.size for file in files] == [1, 2, 3, 4]
    for pattern in (f"{root}/none.txt", f"{root}/none/*.txt", "s3://no-such-bucket/*.txt", "s3://no-such-bucket/a.txt"):
        with pytest.raises(UserError, match=r"domain 'web', pattern '.*' matches no file"):
            resolve_files([pattern], "web")
    with pytest.raises(UserError, match="names a folder"):
        resolve_files([root], "web")


# Splitting


def test_the_split_is_fixed_for_ever() -> None:
    held_out = [record for record in range(100) if in_validation(domain_seed("math"), "a.jsonl", record, 0.1)]
    assert held_out == [6, 9, 21, 33, 34, 35, 43, 45, 60, 75, 87, 95]


def test_the_split_holds_out_the_fraction_and_depends_on_each_argument() -> None:
    def held_out(domain: str, name: str, fraction: float) -> set[int]:
        seed = domain_seed(domain)
        return {record for record in range(20_000) if in_validation(seed, name, record, fraction)}

    base = held_out("math", "a.jsonl", 0.1)
    assert 1800 < len(base) < 2200
    assert base < held_out("math", "a.jsonl", 0.2)
    assert held_out("math", "a.jsonl", 0.0) == set()
    for other in (held_out("code", "a.jsonl", 0.1), held_out("math", "b.jsonl", 0.1)):
        assert len(base & other) < 400
