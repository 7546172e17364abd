"""Runs as training leaves them, made without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddk.values import DomainGap, Mixture
from storage.files import uri
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record

START = 1_700_000_000.0
"""Unix time at which the first step of each begins."""


def make_run(
    root: str,
    name: str,
    *,
    steps: tuple[int, ...] = (2, 4),
    planned: int = 4,
    ratios: tuple[float, ...] = (3.0, 2.0),
    finished: bool = True,
    stores: dict[str, dict[str, str]] | None = None,
    identity: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    checkpoints: bool = True,
    start: float = START,
) -> RunFolder:
    """A run of the domains 'code' and 'math' with an interval up to each of `steps`.

    A step takes 2 s for 100 tokens, and 3 s with what is around it. The ratio of 'code' is `ratios` at each
    measurement (the last one again where there are more), that of 'math' half of it.
    """
    folder = RunFolder(root, name)
    folder.claim(
        {"name": name, "stores": stores or {}, **(identity or {})},
        {"method": "ddk", "seed": 7, "run": name, "train": {"steps": planned}, **(config or {})},
    )
    history, saved = MixtureHistory(folder.url), CheckpointFolder(folder.url)
    for version, step in enumerate((0, *steps)):
        ratio = ratios[min(version, len(ratios) - 1)]
        gaps = [
            DomainGap(domain=d, student_ppl=10.0 * r, teacher_ppl=10.0)
            for d, r in (("code", ratio), ("math", ratio / 2))
        ]
        history.append(
            make_record(
                version=version,
                step=step,
                tokens_seen=100 * step,
                gaps=gaps,
                mixture=Mixture(probabilities={"code": 0.75, "math": 0.25}),
                blocks_drawn={"code": step, "math": step},
            )
        )
    for first, last in zip((0, *steps), steps, strict=False):
        rows = [
            {
                "step": s,
                "tokens": 100,
                "seconds": 2.0,
                "waited_seconds": 0.5,
                "wall_seconds": 3.0,
                "time": start + 3.0 * s,
            }
            for s in range(first + 1, last + 1)
        ]
        folder.write_metrics(first, rows)
        if checkpoints:
            record = saved.put(
                last, "rank-00000.safetensors", lambda path: Path(path).write_bytes(b"weights of a step")
            )
            saved.commit(last, {"rank-00000.safetensors": record}, {"step": last})
    if finished:
        uri.write_bytes(uri.join(folder.student_url, "model.safetensors"), b"weights")
        folder.finish({"steps": steps[-1], "tokens_seen": 100 * steps[-1], "stopped_early": None})
    return folder
