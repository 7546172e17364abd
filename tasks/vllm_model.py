"""A vLLM engine as lm-evaluation-harness wants a model: the harness's own class, with an end that is sure.

Imports the harness and vLLM; import this module within functions only.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.vllm_causallms import VLLM

from tasks.orphans import Descendants
from tasks.teacher import TeacherConfig, model_rows, on_gpu, resolved_dtype
from tasks.transformers_model import room_for_text
from tasks.vllm_engine import engine_environment
from tasks.vllm_portable import LOGITS_BYTES

_AT_ONCE = 1_000_000
"""Requests that are handed to the engine together; it batches them itself."""


class VllmModel(VLLM):  # type: ignore[misc]
    """An engine that lives until `close`, or until this process ends, however that happens.

    Args:
        config: what to run.
        tokenizer: folder of its tokenizer.
        seed: of the engine.
    """

    def __init__(self, config: TeacherConfig, *, tokenizer: str, seed: int) -> None:
        self._processes = Descendants()
        # Prompt log-probabilities make the logits of a step whole, outside what the engine reserves memory for.
        rows = model_rows(config) or 1
        try:
            with engine_environment(config), self._processes.marked():
                super().__init__(
                    pretrained=config.model,
                    tokenizer=tokenizer,
                    dtype=resolved_dtype(config),
                    quantization=config.quantization,
                    trust_remote_code=config.trust_remote_code,
                    tensor_parallel_size=config.tensor_parallel_size,
                    batch_size=_AT_ONCE,
                    seed=seed,
                    max_num_batched_tokens=max(128, min(config.max_batch_tokens, LOGITS_BYTES // (4 * rows))),
                    max_num_seqs=256 if on_gpu() else 32,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    enable_chunked_prefill=True,
                    # Prompt log-probabilities of a prefix that is taken from the cache would be missing.
                    enable_prefix_caching=False,
                    enforce_eager=not on_gpu(),
                    load_format="safetensors",
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                )
        except BaseException:
            self._processes.close()
            raise

    def modify_gen_kwargs(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str], int]:
        """As the harness has it, with room for the prompt."""
        options, until, tokens = VLLM.modify_gen_kwargs(*args, **kwargs)
        return options, until, room_for_text(tokens, self.max_length)

    def close(self) -> None:
        """End the engine's processes and free their memory."""
        try:
            self.model.llm_engine.engine_core.shutdown()
        finally:
            self._processes.close()
