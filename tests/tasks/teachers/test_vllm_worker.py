"""What the worker's extension does with a step, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tasks.teachers import vllm_worker
from tasks.teachers.vllm_worker import LABEL_KEY, ROW_KEY, CaptureExtension, ResultBuffer


def make_worker(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A worker as vLLM would make it, with the parts that the extension looks at."""
    import vllm.distributed

    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=changes.get("prefix", False)),
        speculative_config=changes.get("speculative"),
        lora_config=changes.get("lora"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=changes.get("pipeline", 1)),
    )

    class Worker(CaptureExtension):
        def __init__(self) -> None:
            self.vllm_config = config
            self.model_runner = SimpleNamespace(
                execute_model_state=None,
                input_batch=SimpleNamespace(req_ids=[]),
                model=SimpleNamespace(compute_logits=lambda hidden: hidden),
            )

        def execute_model(self, scheduler_output: Any) -> str:
            return "executed"

        def sample_tokens(self, grammar: Any) -> str:
            return "sampled"

    return Worker()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": True}, "prefix caching"),
        ({"speculative": object()}, "speculative decoding"),
        ({"lora": object()}, "LoRA"),
        ({"pipeline": 2}, "pipeline parallelism"),
    ],
)
def test_engines_that_would_miss_positions_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        make_worker(monkeypatch, **change).ddk_install(10, 2, 1024)


def test_a_vllm_without_the_needed_names_is_refused_with_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(monkeypatch)
    del worker.model_runner.execute_model_state
    with pytest.raises(RuntimeError, match=r"lacks \['execute_model_state'\].*tested with 0\.32\.0"):
        worker.ddk_install(10, 2, 1024)


def test_the_tested_version_is_the_installed_one() -> None:
    import vllm

    assert vllm.__version__.split("+")[0] in vllm_worker.TESTED_VERSIONS


class _OutOfMemoryOnce:
    """Projects hidden states to logits, but for chunks above `rows` it is out of memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.seen: list[int] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(hidden))
        if len(hidden) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden


def one_step(worker: Any, hidden: torch.Tensor) -> None:
    """A single request of as many positions as `hidden` has rows."""
    positions = len(hidden)
    new = SimpleNamespace(
        req_id="a",
        prompt_token_ids=[1] * positions,
        num_computed_tokens=0,
        sampling_params=SimpleNamespace(extra_args={ROW_KEY: 0, LABEL_KEY: 2}),
    )
    output = SimpleNamespace(
        finished_req_ids=set(),
        scheduled_new_reqs=[new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={"a": positions},
    )
    worker.execute_model(output)
    worker.model_runner.execute_model_state = SimpleNamespace(hidden_states=hidden)
    worker.model_runner.input_batch.req_ids = ["a"]
    worker.sample_tokens(None)


def test_a_chunk_that_does_not_fit_is_reduced_in_halves(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    worker = make_worker(monkeypatch)
    worker.ddk_install(11, 3, chunk_bytes=4 * 11 * 8)
    front = ResultBuffer(str(tmp_path / "buffer"), 1, 8, (3, 0, 0), create=True)
    worker.ddk_map(str(tmp_path / "buffer"), 1, 8)
    project = _OutOfMemoryOnce(rows=2)
    worker.model_runner.model.compute_logits = project
    hidden = torch.randn(8, 11, generator=torch.Generator().manual_seed(0))
    truth = hidden.double().log_softmax(-1)
    one_step(worker, hidden)
    assert project.seen == [8, 4, 2, 2, 2, 2], "tried whole, halved, and then kept at what fits"
    assert front.arrays["done"].all()
    np.testing.assert_allclose(front.arrays["logprobs"], truth.topk(3).values.numpy(), atol=1e-5)
    assert front.arrays["out_of_memory"][0] == 0


def test_a_row_that_does_not_fit_leaves_a_note_for_the_front_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    worker = make_worker(monkeypatch)
    worker.ddk_install(11, 3, chunk_bytes=4 * 11 * 8)
    front = ResultBuffer(str(tmp_path / "buffer"), 1, 8, (3, 0, 0), create=True)
    worker.ddk_map(str(tmp_path / "buffer"), 1, 8)
    worker.model_runner.model.compute_logits = _OutOfMemoryOnce(rows=0)
    with pytest.raises(torch.OutOfMemoryError):
        one_step(worker, torch.randn(8, 11))
    assert front.arrays["out_of_memory"][0] == 1
    assert not front.arrays["done"].any()


def test_rows_of_chunked_mixed_and_foreign_requests_land_where_they_belong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Two of our requests in pieces, one of somebody else's between them, a decoded token that is no prompt row."""
    vocab, length = 11, 5
    worker = make_worker(monkeypatch)
    worker.ddk_install(vocab, 3, chunk_bytes=4 * vocab * 2)  # two rows a chunk
    path = str(tmp_path / "buffer")
    front = ResultBuffer(path, 3, length, (3, 0, 0), create=True)
    worker.ddk_map(path, 3, length)
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, length, vocab + 2, generator=generator)  # two padded columns
    truth[..., vocab:] = 100.0
    prompts = {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10]}
    rows = {"a": 2, "b": 0}

    def new(name: str) -> Any:
        extra = {ROW_KEY: rows[name], LABEL_KEY: 0} if name in rows else None
        return SimpleNamespace(
            req_id=name,
            prompt_token_ids=prompts.get(name, [1, 1]),
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args=extra),
        )

    def step(order: list[str], news: list[str], cached: dict[str, int], counts: dict[str, int], hidden: Any) -> None:
        output = SimpleNamespace(
            finished_req_ids=set(),
            scheduled_new_reqs=[new(name) for name in news],
            scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
            num_scheduled_tokens=counts,
        )
        assert worker.execute_model(output) == "executed"
        worker.model_runner.execute_model_state = SimpleNamespace(hidden_states=hidden)
        worker.model_runner.input_batch.req_ids = order
        assert worker.sample_tokens(None) == "sampled"

    first = torch.cat([truth[2, :3], torch.zeros(2, vocab + 2), truth[0, :1]])
    step(["a", "x", "b"], ["a", "x", "b"], {}, {"a": 3, "x": 2, "b": 1}, first)
    step(["b", "a"], [], {"a": 3, "b": 1}, {"b": 4, "a": 2}, torch.cat([truth[0, 1:], truth[2, 3:]]))
    # A decoding step behind the prompt: nothing of it may be written.
    step(["a"], [], {"a": 5}, {"a": 1}, torch.full((1, vocab + 2), 7.0))

    assert front.arrays["done"].reshape(3, length).tolist() == [[1] * length, [0] * length, [1] * length]
    arrays = {name: array.reshape(3, length, -1) for name, array in front.arrays.items() if len(array) == 3 * length}
    for name, row in rows.items():
        expected = truth[row, :, :vocab].double().log_softmax(-1)
        labels = torch.tensor([*prompts[name][1:], 0])
        np.testing.assert_array_equal(arrays["ids"][row], expected.topk(3).indices.numpy())
        np.testing.assert_allclose(arrays["logprobs"][row], expected.topk(3).values.numpy(), atol=1e-5)
        np.testing.assert_allclose(
            arrays["true_logprobs"][row, :, 0], expected.gather(-1, labels[:, None])[:, 0].numpy(), atol=1e-5
        )
