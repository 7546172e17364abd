"""The checks of `ddk doctor`. That vLLM's engine captures what a forward pass computes is tested with the teachers."""

from __future__ import annotations

import json
import resource
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from repository import REPOSITORY

from ddk.errors import UserError
from ddk.values import SparseTargets
from storage.files import uri
from tasks.diagnosis import machine, numerics, services
from tasks.diagnosis.result import Check, Found, check

TEACHER = str(REPOSITORY / "flows" / "presets" / "quickstart" / "teacher")


def test_whatever_a_check_raises_is_a_failure() -> None:
    def fails(error: Exception) -> Check:
        def look() -> Found:
            raise error

        return check("it", look)

    one = fails(UserError("no such folder; name another"))
    assert (one.state, one.said, one.remedy) == ("fail", "no such folder; name another", "")
    other = fails(RuntimeError("CUDA error: no kernel image\nmore"))
    assert (other.state, other.said) == ("fail", "RuntimeError: CUDA error: no kernel image")
    assert "report it" in other.remedy
    private = check("storage", lambda: Found("ok", "s3://mine/secret"), private=True)
    assert private.said == "s3://mine/secret"
    assert "mine" not in json.dumps(private.as_json())


def test_a_step_is_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numerics.training_step().state == "ok"
    forward = numerics.StudentLoss.forward

    def wrong(self: Any, *arguments: Any) -> Any:
        total, ce, kl = forward(self, *arguments)
        return total * 1.001, ce, kl

    monkeypatch.setattr(numerics.StudentLoss, "forward", wrong)
    found = numerics.training_step()
    assert found.state == "fail"
    assert "1.0e-03 in float32" in found.said


@pytest.mark.parametrize(("off", "state"), [(0.0, "ok"), (0.01, "fail")])
def test_a_capture_is_compared_with_a_forward_pass(monkeypatch: pytest.MonkeyPatch, off: float, state: str) -> None:
    class Other:
        def __init__(self, config: Any, *, seq_len: int, vocab_size: int) -> None:
            self.config, self.size = config, vocab_size

        def __enter__(self) -> Other:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def capture(self, tokens: np.ndarray) -> SparseTargets:
            model = transformers.AutoModelForCausalLM.from_pretrained(self.config.model, dtype=torch.float32)
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens[:, :-1]).long()).logits[..., : self.size]
            own = logits.log_softmax(-1).gather(-1, torch.from_numpy(tokens[:, 1:]).long()[..., None])[..., 0].numpy()
            own[3, 5] += off
            best = logits.log_softmax(-1).topk(self.config.k)
            return SparseTargets(
                ids_BLK=best.indices.int().numpy(),
                logprobs_BLK=best.values.numpy(),
                tail_mass_BL=np.zeros_like(own),
                true_logprobs_BL=own,
            )

    monkeypatch.setattr(numerics, "VllmTeacher", Other)
    found = numerics.capture(TEACHER)
    assert found.state == state
    assert ("largest deviation 0.01 nats" in found.said) == (state == "fail")


def test_processes_that_cannot_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numerics.collectives() == Found("ok", "gloo sums over 2 processes")
    monkeypatch.setattr(numerics, "_RING", "raise SystemExit('no route to host')")
    found = numerics.collectives()
    assert found.state == "fail"
    assert "gloo over 2 processes failed" in found.said


def test_versions_that_are_not_locked(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text(
        f"# made\nnumpy=={np.__version__}\ntorch==1.0 ; sys_platform == 'no-such'\ntransformers==4.0.0\nnot-there==3\n"
    )
    found = machine.locked_versions(str(lock))
    assert found.state == "note"
    assert found.said == f"other versions than locked: transformers {transformers.__version__} (locked: 4.0.0)"
    assert machine.locked_versions(str(REPOSITORY / "requirements" / "cpu.txt")).state == "ok"
    assert "no lock file" in machine.locked_versions(None).said


def test_what_a_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.python().state == machine.open_files().state == machine.gpus().state.replace("note", "ok") == "ok"
    usage = types.SimpleNamespace(free=64 << 20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert "--shm-size" in machine.shared_memory().remedy
    assert machine.disk("/").state == "note"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (1024, resource.RLIM_INFINITY))
    assert "ulimit -n" in machine.open_files().remedy
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = machine.gpus()
    assert (found.state, "make setup" in found.remedy) == ("fail", True)


def test_a_root_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    for root in (str(tmp_path), f"{s3_server}/doctor"):
        found = services.storage(root)
        assert found.state == "ok", found
        assert "the clocks agree" in found.said
        assert uri.list_names(root) == []
    monkeypatch.setattr(services, "_skew", lambda place: 90.0)
    assert services.storage(str(tmp_path)).said.endswith("its clock differs by 90 s from this machine's")
    monkeypatch.setattr(services.uri, "create_bytes", lambda place, content: True)
    assert "conditional writes do not work" in services.storage(str(tmp_path)).said
    assert list(tmp_path.iterdir()) == []
