"""The teacher on a server that somebody else runs: vLLM behind its OpenAI-compatible interface.

    vllm serve Qwen/Qwen2.5-14B --max-logprobs 64 --max-model-len 4096

Every block goes as one request `POST {server_url}/completions`: all its L + 1 token ids as the prompt and
`prompt_logprobs`, so that each of the L positions is a prompt position. The server must have room for the one token
that it generates behind them, so its `--max-model-len` must be L + 2 or more. (The last position as the generated
token, as `tasks.teachers.prompt_teacher` has it, would save that one place, and be wrong on a server whose
`--logprobs-mode` is processed_logprobs; prompt positions are right on it.) Several requests are under way at a time.

What such a teacher cannot give, or not as well:

- k: at most the server's `--max-logprobs`, which is 20 unless it was started with more.
- no random draws, no tails at other temperatures, no entropy (`source: engine` gives them).
- small tails, and a padded vocabulary: what `tasks.teachers.prompt_logprobs` says of both. Where `teacher.model` has no
  config.json, nothing says how many rows are padding, and a position may keep fewer than k.
- speed: the server turns every id into text and writes JSON; expect a fifth of what its GPU could do.
- equal bytes at every capture: the server's other requests and its kernels are beyond our control.
- **The weights cannot be fingerprinted.** A store's fingerprint holds the served name, the server's version and
  `teacher.revision`. If the weights under the same name change, change `teacher.revision`; otherwise the old cache is
  reused for them. (For a `teacher.model` on the hub it is also the revision of the tokenizer; for a folder it is free
  text.)

`teacher.model` is needed for its tokenizer alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ddk.errors import UserError
from ddk.values import Int32Array, SparseTargets
from storage.files.remembered import recall, remember
from tasks.showing.progress import logger
from tasks.teachers.config import TeacherConfig, model_rows
from tasks.teachers.prompt_logprobs import Rows, assemble, entries_to_ask, ranked_rows, stacked, warn_of_padding
from tasks.teachers.server_client import KEY_VARIABLE, WAITS, ServerClient, ServerRefusedError, ServerUnreachableError
from tasks.teachers.source import TeacherSource

IN_FLIGHT = 8
"""Requests under way at a time: the next ones lie ready when the server's batch has room."""
_CLAMPED = -9999.0
"""What vLLM writes for −inf, which JSON cannot hold."""


class ServerTeacher(TeacherSource):
    """Connects at the first capture; where everything is captured already, the server need not run.

    Args:
        config, seq_len, vocab_size: as of every source.
        waits: seconds before each further attempt of a request.

    Raises:
        UserError: as every source does.
    """

    name = "server"

    def __init__(self, config: TeacherConfig, *, seq_len: int, vocab_size: int, waits: Sequence[float] = WAITS) -> None:
        super().__init__(config, seq_len=seq_len, vocab_size=vocab_size)
        self._waits = waits
        self._asked = entries_to_ask(config.k, vocab_size, model_rows(config) or vocab_size)
        self._client: ServerClient | None = None
        self._name = ""
        self._parsing = threading.Lock()

    def close(self) -> None:
        """Let go of the connections. Harmless when called twice."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        """The teacher's targets at every position of some blocks.

        Args:
            tokens_BL1: [B, L + 1] int32, at most `shard_blocks` blocks.

        Raises:
            UserError: the server cannot be reached, or refuses; what it said is repeated.
            RuntimeError: its answer lacks a position (nothing is returned then).
        """
        client = self._client or self._connect()
        executor = ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="ddk-server")
        try:
            rows = list(executor.map(lambda tokens: self._ask(client, tokens), tokens_BL1))
        finally:
            executor.shutdown(cancel_futures=True)
        return assemble(stacked(rows), blocks=len(tokens_BL1), k=self.config.k, vocab_size=self.vocab_size)

    def _connect(self) -> ServerClient:
        warn_of_padding("server", self.vocab_size, model_rows(self.config) or self.vocab_size)
        client = ServerClient(_url(self.config), self._waits)
        try:
            card = _card(client, self.config)
            longest = card.get("max_model_len")
            if longest is not None and longest < self.seq_len + 2:
                raise UserError(
                    f"packing.seq_len is {self.seq_len}, and the server takes {longest} tokens, including the one "
                    f"that it generates: lower packing.seq_len to {longest - 2}, or start the server with "
                    f"--max-model-len {self.seq_len + 2}"
                )
        except BaseException:
            client.close()
            raise
        self._client, self._name = client, card["id"]
        return client

    def _ask(self, client: ServerClient, tokens_L1: Int32Array) -> Rows:
        tokens = tokens_L1.tolist()
        body = {
            "model": self._name,
            "prompt": tokens,
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self._asked,
            "return_token_ids": True,
        }
        try:
            content = client.request("POST", f"{client.url}/completions", body)
        except ServerRefusedError as error:
            raise UserError(f"{error}; {self._remedy(error) or _remedy(error)}") from None
        # One at a time: parsed, an answer is a hundred times its size in arrays.
        with self._parsing:
            return self._rows_of(content, tokens)

    def _remedy(self, refused: ServerRefusedError) -> str | None:
        if refused.parameter == "prompt_logprobs":
            spare = f" ({self._asked} are asked for, since the vocabulary is padded)" * (self._asked > self.config.k)
            return f"lower teacher.k{spare}, or start the server with --max-logprobs {self._asked}"
        if refused.parameter in ("input_tokens", "max_tokens"):
            return f"lower packing.seq_len, or start the server with --max-model-len {self.seq_len + 2}"
        return None

    def _rows_of(self, content: bytes, tokens: list[int]) -> Rows:
        try:
            choice = json.loads(content)["choices"][0]
            seen, positions = choice.get("prompt_token_ids"), choice["prompt_logprobs"][1:]
            counts = np.array([len(position) for position in positions], dtype=np.int64)
            ids = np.array([int(token) for position in positions for token in position], dtype=np.int32)
            entries = [entry for position in positions for entry in position.values()]
            logprobs = np.array([entry["logprob"] for entry in entries], dtype=np.float32)
            ranks = np.array([entry["rank"] for entry in entries], dtype=np.int64)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{_url(self.config)} answers without prompt_logprobs as vLLM writes them "
                f"({type(error).__name__}: {error}); teacher.source 'server' needs a vLLM server"
            ) from None
        if len(counts) != self.seq_len or (seen is not None and seen != tokens):
            raise RuntimeError(
                f"the server answered for {len(counts)} of {self.seq_len} positions, or for other tokens than it was "
                f"sent; nothing was stored"
            )
        logprobs[logprobs <= _CLAMPED] = -np.inf
        return ranked_rows(ids, logprobs, ranks, counts, np.array(tokens[1:], dtype=np.int32), self._asked)


def server_identity(config: TeacherConfig, memory_url: str) -> dict[str, str | None]:
    """What is known of the model behind a server, for a fingerprint: its served name and the server's version.

    It is remembered in the JSON file `memory_url`, so that stages after the capture can be planned when the server is
    no longer there.

    Returns:
        `{"name", "version"}`.

    Raises:
        UserError: the server cannot be reached and was never seen, or does not serve that name.
    """
    place = f"{_url(config)} {config.server_model or ''}".strip()
    known = recall(memory_url).get(place)
    try:
        with ServerClient(_url(config), WAITS[:2]) as client:
            found = {"name": str(_card(client, config)["id"]), "version": client.version()}
    except ServerUnreachableError as error:
        if not isinstance(known, dict) or set(known) != {"name", "version"}:
            raise
        logger.info("%s; using what the server reported when it was last reached", error)
        return known
    if known != found:
        remember(memory_url, {place: found})
    return found


def _url(config: TeacherConfig) -> str:
    if config.server_url is None:
        raise UserError("teacher.source is 'server', and teacher.server_url is missing; set it")
    return config.server_url.rstrip("/")


def _card(client: ServerClient, config: TeacherConfig) -> dict[str, Any]:
    """What the server says of the model."""
    try:
        cards = client.models()
    except ServerRefusedError as error:
        raise UserError(f"{error}; {_remedy(error)}") from None
    names = ", ".join(str(card["id"]) for card in cards)
    wanted = config.server_model
    found = [card for card in cards if wanted is None or card["id"] == wanted]
    if not cards:
        raise UserError(f"{client.url} serves no model; see its log")
    if not found:
        raise UserError(f"teacher.server_model is '{wanted}', and {client.url} serves {names}; correct it")
    if len(found) > 1:
        raise UserError(f"{client.url} serves {names}; name the teacher among them in teacher.server_model")
    return found[0]


def _remedy(refused: ServerRefusedError) -> str:
    if refused.status in (401, 403):
        return f"set the environment variable {KEY_VARIABLE} to the server's key"
    if refused.status == 404:
        return "correct teacher.server_url (it ends with /v1) or teacher.server_model"
    return "see teacher.server_url and the server's log"
