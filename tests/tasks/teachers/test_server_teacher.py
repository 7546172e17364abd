"""A teacher on a real vLLM server, with a key, and on small servers that fail in one way each."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from teacher_contract import TeacherContract
from tiny_model import make_tiny_model, true_logprobs

from ddk.errors import UserError
from ddk.values import SparseTargets
from storage.files.remembered import remember
from tasks.teachers.config import TeacherConfig
from tasks.teachers.server_client import ServerClient, ServerUnreachableError
from tasks.teachers.server_teacher import ServerTeacher, server_identity

SEQ_LEN, VOCAB, K, LIMIT = 60, 4090, 16, 20
KEY = "sk-for-this-test-only"

Answer = tuple[int, bytes, dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: str) -> str:
    """A tiny model with the tokenizer of the quickstart: the server turns ids into text."""
    path = tmp_path_factory.mktemp("tiny")
    model = make_tiny_model(path, rows=VOCAB, context=SEQ_LEN + 2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((Path(teacher_folder) / name).read_bytes())
    return model


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yields its address. What `vllm serve` starts; that command itself needs a distribution named vllm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--model", folder, "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    options += ["--dtype", "float32", "--max-logprobs", str(LIMIT), "--enforce-eager"]
    settings = {"VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(process, f"http://127.0.0.1:{port}/version", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDK_TEACHER_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (11, SEQ_LEN + 1)).astype(np.int32)


@pytest.fixture
def teacher(folder: str) -> Callable[..., ServerTeacher]:
    def make(url: str, seq_len: int = SEQ_LEN, vocab_size: int = VOCAB, **changes: Any) -> ServerTeacher:
        config = TeacherConfig(**{"model": folder, "source": "server", "server_url": url, "k": K, **changes})
        return ServerTeacher(config, seq_len=seq_len, vocab_size=vocab_size, waits=(0.01, 0.02, 0.04))

    return make


@contextmanager
def answering(answer: Callable[[str, str, bytes], Answer]) -> Iterator[str]:
    """A server that answers (method, path, body) with what the function says. Yields its address up to /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content, headers = answer(
                self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
            )
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def listing(*names: str, **more: Any) -> bytes:
    return json.dumps({"data": [{"id": name, **more} for name in names]}).encode()


def saying(status: int, message: str, **headers: str) -> Answer:
    return status, json.dumps({"error": {"message": message}}).encode(), headers


def serving(answer: Callable[[bytes], Answer]) -> AbstractContextManager[str]:
    """A server of one model, that answers completions so."""
    return answering(lambda method, _, body: answer(body) if method == "POST" else (200, listing("tiny"), {}))


@pytest.fixture(scope="module")
def captured(server: str, folder: str, tokens: np.ndarray) -> SparseTargets:
    config = TeacherConfig(model=folder, source="server", server_url=server, k=K)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDK_TEACHER_API_KEY", KEY)
        patch.setenv("NO_PROXY", "127.0.0.1")
        with ServerTeacher(config, seq_len=SEQ_LEN, vocab_size=VOCAB) as source:
            return source.capture(tokens)


@pytest.fixture(scope="module")
def truth(folder: str, tokens: np.ndarray) -> torch.Tensor:
    return true_logprobs(folder, tokens)


@pytest.fixture
def unopened(teacher: Callable[..., ServerTeacher]) -> Callable[..., ServerTeacher]:
    return partial(teacher, "http://127.0.0.1:9/v1")  # nobody listens there


class TestServer(TeacherContract):
    tail_tolerance = 2e-6


def test_true_tokens_are_among_the_kept_ones_and_outside(captured: SparseTargets) -> None:
    assert (captured.true_logprobs < captured.logprobs[..., -1]).any()
    assert (captured.true_logprobs >= captured.logprobs[..., -1]).any()


def test_the_key_is_not_in_the_log(
    server: str, teacher: Callable[..., ServerTeacher], tokens: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with teacher(server) as source:
        source.capture(tokens[:1])
    assert caplog.text
    assert KEY not in caplog.text


def test_padded_rows_are_dropped(server: str, teacher: Callable[..., ServerTeacher], tokens: np.ndarray) -> None:
    few = VOCAB // 2
    with teacher(server, vocab_size=few) as source:
        captured = source.capture(tokens[:2] % few)
    kept = captured.logprobs > -np.inf
    assert 0.3 < kept.mean() < 1.0, "the test needs padding among the most probable"
    assert captured.ids.max() < few
    assert (captured.ids[~kept] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 21}, r"answered 400: .*max allowed: 20.*; lower teacher.k, or start the server with --max-logprobs 21"),
        ({"k": 19, "vocab_size": 4000}, r"lower teacher.k \(23 are asked for, since the vocabulary is padded\), or"),
        ({"server_model": "other"}, r"teacher.server_model is 'other', and http.*/v1 serves tiny; correct it"),
        ({"seq_len": 61}, r"seq_len is 61, and the server takes 62 tokens.* lower packing.seq_len to 60, or start the"),
    ],
)
def test_what_the_server_refuses(
    server: str, teacher: Callable[..., ServerTeacher], changes: dict[str, Any], message: str
) -> None:
    blocks = np.zeros((1, changes.get("seq_len", SEQ_LEN) + 1), dtype=np.int32)
    with teacher(server, **changes) as source, pytest.raises(UserError, match=message):
        source.capture(blocks)


def test_a_wrong_key_and_a_wrong_path(
    server: str, teacher: Callable[..., ServerTeacher], tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"answered 404: .*; correct teacher.server_url \(it ends with /v1\)"):
        teacher(server.removesuffix("/v1")).capture(tokens)
    monkeypatch.setenv("DDK_TEACHER_API_KEY", "wrong")
    with pytest.raises(UserError, match=r"answered 401: .*; set the environment variable DDK_TEACHER_API_KEY") as error:
        teacher(server).capture(tokens)
    assert "wrong" not in str(error.value)


def test_503_twice_then_answers(server: str, teacher: Callable[..., ServerTeacher], tokens: np.ndarray) -> None:
    refused: list[bytes] = []

    def answer(method: str, path: str, body: bytes) -> Answer:
        if method == "POST" and len(refused) < 2:
            refused.append(body)
            return saying(503, "warming up")
        url, headers = f"{server.removesuffix('/v1')}{path}", {"Authorization": f"Bearer {KEY}"}
        real = httpx.request(method, url, content=body, headers=headers | {"Content-Type": "application/json"})
        return real.status_code, real.content, {}

    with answering(answer) as url, teacher(url) as source, teacher(server) as direct:
        captured = source.capture(tokens[:1])
        assert len(refused) == 2
        np.testing.assert_array_equal(captured.ids, direct.capture(tokens[:1]).ids)


def test_a_server_that_keeps_failing(teacher: Callable[..., ServerTeacher], tokens: np.ndarray) -> None:
    asked: list[float] = []

    def answer(_: bytes) -> Answer:
        asked.append(time.monotonic())
        return saying(429, f"too many requests\n with {KEY}", **{"Retry-After": "0.3"})

    with serving(answer) as url, teacher(url) as source:
        message = r"answered 429: too many requests with \*\*\* \(4 attempts\); check that the server runs, then run"
        with pytest.raises(ServerUnreachableError, match=message):
            source.capture(tokens[:1])
    assert len(asked) == 4
    assert np.diff(asked).min() >= 0.3, "the server says how long to wait"


def test_a_server_that_is_down(teacher: Callable[..., ServerTeacher], tokens: np.ndarray) -> None:
    with serving(lambda _: saying(500, "-")) as url:
        pass
    with pytest.raises(UserError, match=r"/v1/models cannot be reached \(.*refused.*\) \(4 attempts\)"):
        teacher(url).capture(tokens[:1])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"<html>", UserError, "answers without prompt_logprobs as vLLM writes them .* needs a vLLM server"),
        (b'{"choices": [{"text": ""}]}', UserError, "answers without prompt_logprobs as vLLM writes them"),
        (b'{"choices": [{"prompt_logprobs": [null]}]}', RuntimeError, "answered for 0 of 60 positions"),
    ],
)
def test_a_server_that_is_another(
    teacher: Callable[..., ServerTeacher], tokens: np.ndarray, content: bytes, error: type[Exception], message: str
) -> None:
    with serving(lambda _: (200, content, {})) as url, pytest.raises(error, match=message):
        teacher(url).capture(tokens[:1])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, listing("one", "two"), {}), "serves one, two; name the teacher among them in teacher.server_model"),
        ((200, listing(), {}), "serves no model; see its log"),
        ((200, b"[]", {}), "/v1/models does not list models as an OpenAI-compatible server does"),
        ((307, b"", {"Location": "http://127.0.0.1:9/"}), "answered 307"),
    ],
)
def test_a_list_of_models_that_does_not_say_which(
    teacher: Callable[..., ServerTeacher], tokens: np.ndarray, answer: Answer, message: str
) -> None:
    with answering(lambda *_: answer) as url, pytest.raises(UserError, match=message):
        teacher(url).capture(tokens[:1])


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDK_TEACHER_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="DDK_TEACHER_API_KEY holds characters that no key has") as error:
        ServerClient("http://127.0.0.1:9/v1")
    assert "lines" not in str(error.value)


def test_the_server_is_remembered_for_when_it_is_gone(server: str, folder: str, tmp_path: Path) -> None:
    memory = str(tmp_path / "servers.json")
    config = TeacherConfig(model=folder, source="server", server_url=server)
    seen = server_identity(config, memory)
    assert seen == {"name": "tiny", "version": "0.32.0"}
    gone = config.model_copy(update={"server_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(ServerUnreachableError, match="cannot be reached"):
        server_identity(gone, memory)
    for wrong in ("tiny", [seen], {"name": "tiny"}, None):
        remember(memory, {"http://127.0.0.1:9/v1": wrong})
        with pytest.raises(ServerUnreachableError, match="cannot be reached"):
            server_identity(gone, memory)
    remember(memory, {"http://127.0.0.1:9/v1": seen})
    assert server_identity(gone, memory) == seen
    with pytest.raises(UserError, match=r"teacher.server_model is 'other'"):
        server_identity(config.model_copy(update={"server_model": "other"}), memory)
    with answering(lambda _, path, __: (200, listing("tiny"), {}) if "models" in path else (404, b"", {})) as url:
        silent = server_identity(config.model_copy(update={"server_url": url}), memory)
    assert silent == {"name": "tiny", "version": None}


def test_what_only_the_engine_gives_is_refused(folder: str) -> None:
    config = TeacherConfig(model=folder, source="server", server_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"teacher.draws is 3, .* set source: engine, or leave draws out"):
        ServerTeacher(config.model_copy(update={"draws": 3}), seq_len=SEQ_LEN, vocab_size=VOCAB)
