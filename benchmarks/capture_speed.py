"""How fast the teacher is captured, beside its floor and beside other ways: one shape, one process.

    python benchmarks/capture_speed.py 4M|30M|wide ROUNDS

Prints one line of JSON: for each path the tokens a second of every round. The paths take turns within a round, so that
whatever else the machine does meets all of them. All use the same cores, and glibc keeps its memory for all of them.

    floor         bare prefill and the projection of all positions, no top-k, in the same worker
    bare          the prefill alone
    ours          `cache_targets`: captured, encoded, stored and committed
    one_shard     the same with all blocks in one shard, which shows what scheduling each shard as a unit costs
    portable      `source: prompt_logprobs`: the arrays, not stored
    users         `prompt_logprobs=64` and dictionaries, as most users write it
    transformers  forward, log_softmax and topk
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from storage.stores.manifest import StoreWriter
from tasks.capture.cache_targets import cache_targets
from tasks.planning.store_plan import Plan, StorePlan
from tasks.teachers import engine_teacher as vllm_teacher
from tasks.teachers.config import TeacherConfig, target_format
from tasks.teachers.engine_teacher import VllmTeacher
from tasks.teachers.prompt_teacher import PortableTeacher
from tasks.teachers.vllm_engine import engine_environment

SEQ_LEN, K = 512, 64
SHAPES = {
    # rows of the vocabulary, width, layers, heads, width of the MLP, blocks in a shard, blocks in a round
    "4M": (4096, 256, 4, 4, 688, 64, 128),
    "30M": (32000, 512, 4, 8, 1376, 16, 32),
    "wide": (151_936, 128, 2, 2, 344, 16, 32),
}


def make_model(folder: str, name: str) -> None:
    """Random weights, and a tokenizer of as many tokens (the users' way decodes every id)."""
    vocab, width, layers, heads, mlp, _, _ = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=0,
        dtype="float32",
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({f"t{i}": i for i in range(vocab)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0")  # noqa: S106
    fast.save_pretrained(folder)


def make_plan(folder: str, config: TeacherConfig, tokens: np.ndarray, vocab: int) -> Plan:
    """One domain whose train blocks are `tokens`; of validation there is one block, as there must be."""
    dims = {"seq_len": SEQ_LEN, "vocab_size": vocab}
    blocks_url = f"{folder}/blocks.zarr"
    writer = StoreWriter(blocks_url, "blocks", {}, {**dims, "shard_blocks": 1024})
    if not writer.manifest.complete:
        for split, part in (("train", tokens), ("validation", tokens[:1])):
            writer.write_shard(split, 0, {"tokens": part})
        writer.finish()
    store = StorePlan(
        domain="bench",
        corpus=None,  # type: ignore[arg-type]
        train_files=(),
        validation_files=(),
        blocks_url=blocks_url,
        blocks_inputs={},
        blocks_dims={},
        targets_url=tempfile.mkdtemp(dir=folder),
        targets_inputs={},
        targets_dims={**dims, "k": config.k, "shard_blocks": config.shard_blocks},
        targets_form=target_format(config),
    )
    return Plan(domains={"bench": store}, teacher_folder=config.model, vocab_size=vocab, eos_id=0)


class Paths:
    """Every path over the same blocks; each gives the number of tokens that it took."""

    def __init__(self, name: str, folder: str) -> None:
        self.vocab = SHAPES[name][0]
        blocks = SHAPES[name][-1]
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, self.vocab, (blocks, SEQ_LEN + 1)).astype(np.int32)
        self.folder = folder
        model = os.path.join(folder, "model")
        make_model(model, name)
        self.config = TeacherConfig(model=model, k=K, dtype="float32", shard_blocks=SHAPES[name][-2])
        whole = self.config.model_copy(update={"shard_blocks": blocks})
        size = {"seq_len": SEQ_LEN, "vocab_size": self.vocab}
        self.teacher, self.whole = VllmTeacher(self.config, **size), VllmTeacher(whole, **size)
        self.portable_teacher = PortableTeacher(self.config.model_copy(update={"source": "prompt_logprobs"}), **size)
        self.hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        with engine_environment(self.config):
            from vllm import LLM

            self.users_llm = LLM(
                model=model, max_model_len=SEQ_LEN + 2, max_logprobs=K, enforce_eager=True, disable_log_stats=True
            )

    def close(self) -> None:
        for teacher in (self.teacher, self.whole, self.portable_teacher):
            teacher.close()
        self.users_llm.llm_engine.engine_core.shutdown()

    def _prefill(self, mode: str) -> int:
        from vllm import SamplingParams

        from tasks.teachers.vllm_worker import LABEL_KEY, ROW_KEY

        llm, rows = self.whole._llm, self.whole.config.shard_blocks
        llm.collective_rpc("ddk_set_mode", args=(mode,))
        prompts = [{"prompt_token_ids": row[:-1].tolist()} for row in self.tokens]
        parameters = [
            SamplingParams(
                max_tokens=1, temperature=0.0, detokenize=False, extra_args={ROW_KEY: i % rows, LABEL_KEY: 0}
            )
            for i in range(len(prompts))
        ]
        llm.generate(prompts, parameters, use_tqdm=False)
        llm.collective_rpc("ddk_set_mode", args=("capture",))
        return len(prompts) * SEQ_LEN

    def floor(self) -> int:
        return self._prefill("floor")

    def bare(self) -> int:
        return self._prefill("bare")

    def ours(self) -> int:
        return self._stored(self.teacher)

    def one_shard(self) -> int:
        return self._stored(self.whole)

    def _stored(self, teacher: VllmTeacher) -> int:
        plan = make_plan(self.folder, teacher.config, self.tokens, self.vocab)
        done = cache_targets.fn(plan, "bench", teacher)
        if done["shards_written"] != -(-len(self.tokens) // teacher.config.shard_blocks) + 1:
            raise SystemExit(f"not everything was captured: {done}")
        return (len(self.tokens) + 1) * SEQ_LEN

    def portable(self) -> int:
        shard = self.config.shard_blocks
        for start in range(0, len(self.tokens), shard):
            self.portable_teacher.capture(self.tokens[start : start + shard])
        return len(self.tokens) * SEQ_LEN

    def users(self) -> int:
        from vllm import SamplingParams

        some = self.tokens[:8]
        prompts = [{"prompt_token_ids": row[:-1].tolist()} for row in some]
        self.users_llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=K), use_tqdm=False)
        self.users_llm.reset_prefix_cache()
        return len(prompts) * SEQ_LEN

    @torch.inference_mode()
    def transformers(self) -> int:
        some = torch.from_numpy(self.tokens[:16, :-1].astype(np.int64))
        for start in range(0, len(some), 4):
            self.hf(some[start : start + 4]).logits.log_softmax(-1).topk(K, dim=-1)
        return some.numel()


PATHS = ("floor", "bare", "ours", "one_shard", "portable", "users", "transformers")


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {path: [] for path in PATHS}
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as folder:
        paths = Paths(name, folder)
        try:
            for number in range(-1, rounds):  # the first warms everything up, and starts the engines
                order = PATHS if number < 0 else PATHS[number % len(PATHS) :] + PATHS[: number % len(PATHS)]
                if number < 0:
                    order = ("ours", "one_shard", *(p for p in PATHS if p not in ("ours", "one_shard")))
                for path in order:
                    call: Callable[[], int] = getattr(paths, path)
                    started = time.perf_counter()
                    tokens = call()
                    if number >= 0:
                        found[path].append(tokens / (time.perf_counter() - started))
        finally:
            paths.close()
    return found


def main() -> None:
    vllm_teacher.WORKER_EXTENSION = "bench_extension.BenchExtension"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result: dict[str, Any] = measure(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
