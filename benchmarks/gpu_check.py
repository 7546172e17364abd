"""What continuous integration cannot run: the paths on CUDA, one after the other, in ten minutes.

    make gpu-check                                            installs the CUDA packages first (`make setup`)
    .venv/bin/python benchmarks/gpu_check.py --cpu --short    the CPU in the GPU's place, a few optimizer steps each
    .venv/bin/python benchmarks/gpu_check.py --only fsdp,loss

Each step is one line, and its figures are in `benchmarks/out/gpu.json` (not with --cpu). A step that fails does not
stop the others; its output lies in the folder that is named at the end.

    doctor      `ddk doctor`: machine, capture and training step against references
    quickstart  `ddk quickstart` on this device
    bf16        its teacher captured again in bfloat16; the engine runs out of memory once, and starts again with half
                the batch (the error is raised by this script)
    killed      training killed by `kill -9` in its second interval and resumed
    fsdp        training with `train.parallel: fsdp` on all GPUs
    compiled    training with `train.compile: true`
    loss        the fused CE + KL beside `F.cross_entropy` and, where it is installed, Liger-Kernel's fused
                cross-entropy: time and peak memory of forward and backward
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Row, publish, row

from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = str(CHECKOUT / "flows" / "presets" / "quickstart.yaml")
SHAPES = {"gpu": (4096, 2048, 151_936, 64), "cpu": (256, 128, 8192, 32)}
"""Positions, width, tokens and stored entries of the loss."""
ROUNDS = 5


class FailedError(Exception):
    """A step did not do what it is for."""


@dataclass
class Place:
    """Where the steps run."""

    root: str
    cpu: bool
    short: bool

    def options(self, **settings: Any) -> list[str]:
        """Options of `ddk` for the quickstart, cut short where that is asked for."""
        if self.short:
            settings = {"train.steps": 8, "mixture.interval": 4, "train.warmup_steps": 2, **settings}
        if self.cpu:
            settings = {"train.device": "cpu", **settings}
        return [
            "--root",
            self.root,
            *(word for name, value in settings.items() for word in ("--set", f"{name}={value}")),
        ]

    def ddk(self, *arguments: str, timeout: float = 540) -> str:
        """Standard output of a command.

        Raises:
            FailedError: it ended with another code than 0.
        """
        done = subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment,
        )
        log = Path(self.root, "logs")
        log.mkdir(parents=True, exist_ok=True)
        (log / f"{len(list(log.iterdir())):02d}-{arguments[0]}.txt").write_text(f"{done.stdout}\n{done.stderr}")
        if done.returncode:
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise FailedError(said[-1][:300] if said else f"ddk {arguments[0]} ended with {done.returncode}")
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        return {**os.environ, "HF_HUB_OFFLINE": "1", **hidden}

    def summary(self, run: str) -> dict[str, Any]:
        return RunFolder(self.root, run).summary() or {}


def doctor(place: Place) -> list[Row]:
    said = json.loads(place.ddk("doctor", "--json"))
    return [row("doctor: checks passed", [sum(one["state"] != "fail" for one in said["checks"])], "checks")]


def quickstart(place: Place) -> list[Row]:
    started = time.monotonic()
    place.ddk("distill", CONFIG, "--run", "quickstart", *place.options())
    seconds = time.monotonic() - started
    planned = json.loads(place.ddk("plan", CONFIG, "--run", "quickstart", "--cost", "--json", *place.options()))
    captured = planned["measured"]["capture"]
    return [
        row("quickstart: whole", [seconds], "s"),
        row("quickstart: capture", [captured["positions"] / captured["seconds"]], "tokens/s"),
        *speed(place, "quickstart"),
    ]


def speed(place: Place, run: str) -> list[Row]:
    """Tokens a second of the optimizer steps of a run that is complete.

    Raises:
        FailedError: it is not.
    """
    summary = place.summary(run)
    if "training_seconds" not in summary:
        raise FailedError(f"run '{run}' is not complete")
    return [row(f"{run}: training", [summary["tokens_seen"] / summary["training_seconds"]], "tokens/s")]


def bf16(place: Place) -> list[Row]:
    """In a process of its own, whose engine's first pass fails as it does when memory runs out."""
    script = (
        "import sys; sys.argv = ['ddk', *sys.argv[1:]]\n"
        "from tasks.teachers import engine_teacher as t\n"
        "real, failed = t.VllmTeacher._capture, []\n"
        "def once(self, tokens):\n"
        "    if not failed:\n"
        "        failed.append(1)\n"
        "        raise RuntimeError('CUDA out of memory (raised by gpu_check)')\n"
        "    return real(self, tokens)\n"
        "t.VllmTeacher._capture = once\n"
        "from flows.__main__ import main\n"
        "main()\n"
    )
    started = time.monotonic()
    options = place.options(**{"teacher.dtype": "bfloat16", "teacher.max_batch_tokens": 8192})
    done = subprocess.run(
        [sys.executable, "-c", script, "cache", CONFIG, *options],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
        env=place.environment,
    )
    if done.returncode or "restarting it with 4096 tokens per pass" not in done.stderr:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise FailedError(said[-1][:300] if said else "the engine was not started again")
    return [row("bf16: capture, with one restart", [time.monotonic() - started], "s")]


def killed(place: Place) -> list[Row]:
    options = ["train", CONFIG, "--run", "killed", *place.options()]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", *options],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=place.environment,
    )
    checkpoints = Path(place.root, "runs", "killed", "checkpoints")
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("*/state.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise FailedError("training wrote no checkpoint that it could be killed behind")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    place.ddk(*options)
    # On a GPU a resumed run is the same as far as its kernels are deterministic.
    one, other = (final_ratios(place, run) for run in ("killed", "quickstart"))
    worst = max(abs(one[domain] / other[domain] - 1.0) for domain in other)
    return [row("killed: largest difference of a ratio", [100 * worst], "%", 5.0)]


def final_ratios(place: Place, run: str) -> dict[str, float]:
    newest = MixtureHistory(RunFolder(place.root, run).url).records()[-1]
    return {gap.domain: gap.ratio for gap in newest.gaps}


def fsdp(place: Place) -> list[Row]:
    processes = {} if not place.cpu else {"train.processes": 2}
    place.ddk("train", CONFIG, "--run", "fsdp", *place.options(**{"train.parallel": "fsdp", **processes}))
    return speed(place, "fsdp")


def compiled(place: Place) -> list[Row]:
    place.ddk("train", CONFIG, "--run", "compiled", *place.options(**{"train.compile": "true"}))
    return speed(place, "compiled")


def loss(place: Place) -> list[Row]:
    device = torch.device("cpu" if place.cpu or not torch.cuda.is_available() else "cuda")
    positions, width, tokens, k = SHAPES["cpu" if device.type == "cpu" else "gpu"]
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, device=device, requires_grad=True)
    weight = (torch.randn(tokens, width, device=device) * 0.02).requires_grad_()
    labels = torch.randint(tokens, (positions,), device=device)
    passes = dict(ways(hidden, weight, labels, tokens, k))
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    peaks: dict[str, float] = {}
    for number in range(ROUNDS + 1):
        for name, call in passes.items():
            hidden.grad = weight.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                value = call()
            value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["F.cross_entropy"])
    rows = [row(f"loss: {name}, beside F.cross_entropy", [one / base for one in seconds[name]], "×") for name in passes]
    return rows + [row(f"loss: {name}, peak memory", [peak], "MiB") for name, peak in peaks.items()]


def ways(hidden: Any, weight: Any, labels: Any, tokens: int, k: int) -> list[tuple[str, Callable[[], Any]]]:
    from ddk.fused import fused_loss
    from ddk.loss import Teacher
    from ddk.train_config import LossConfig

    ids = torch.stack([torch.randperm(tokens, device=labels.device)[:k] for _ in range(8)])
    ids = ids.repeat(len(labels) // 8, 1)
    log_p = torch.randn(len(labels), k, device=labels.device).log_softmax(-1) + torch.log(torch.tensor(0.9))
    teacher = Teacher(ids_TK=ids, log_p_TK=log_p, log_tail_T=torch.full_like(log_p[:, 0], 0.1).log())

    def ours() -> Any:
        return fused_loss(hidden, weight, labels, teacher, LossConfig(gamma=0.5)).total

    def plain() -> Any:
        logits = torch.nn.functional.linear(hidden, weight)
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    found: list[tuple[str, Callable[[], Any]]] = [("F.cross_entropy", plain), ("fused CE + KL", ours)]
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return found
    liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return [*found, ("Liger-Kernel's fused cross-entropy", lambda: liger(weight, hidden, labels))]


STEPS: dict[str, Callable[[Place], list[Row]]] = {
    "doctor": doctor,
    "quickstart": quickstart,
    "killed": killed,
    "fsdp": fsdp,
    "compiled": compiled,
    "bf16": bf16,
    "loss": loss,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the CPU in the GPU's place, to test this script")
    parser.add_argument("--short", action="store_true", help="eight optimizer steps a run")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(STEPS), help="steps, e.g. fsdp,loss")
    asked = parser.parse_args()
    if not asked.cpu and not torch.cuda.is_available():
        print("there is no GPU that torch can use; `ddk doctor` says why, and --cpu tries the script without one")
        return 2
    root = tempfile.mkdtemp(prefix="ddk-gpu-check-")
    place = Place(root, asked.cpu, asked.short)
    rows: list[Row] = []
    failed = []
    for name in [name for name in STEPS if name in asked.only]:
        started = time.monotonic()
        try:
            rows += STEPS[name](place)
            verdict = "ok"
        except (FailedError, subprocess.TimeoutExpired, OSError, RuntimeError, ValueError) as error:
            failed.append(name)
            verdict = f"FAILS: {error}"
        seconds = time.monotonic() - started
        rows.append(row(f"{name}: the step", [seconds], "s"))
        print(f"{name:<12} {seconds:6.0f} s  {verdict}", flush=True)
    if asked.cpu:
        for one in rows:
            print(f"  {one.what:<52} {one.value:>12.3f} {one.unit}")
    held = all(one.holds is not False for one in rows) if asked.cpu else publish("gpu", "make gpu-check", rows)
    if failed:
        print(f"failed: {', '.join(failed)}; what the commands said lies in {root}/logs")
        return 1
    shutil.rmtree(root)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
