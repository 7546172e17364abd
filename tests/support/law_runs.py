"""Runs made from others', as training would have left them: with a further domain, or of another size of student."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ddk.values import DomainGap, Mixture
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord, make_record


def add_domain(
    root: Path,
    source: str,
    name: str,
    domain: str,
    *,
    drawn: int = 20,
    ppl: Callable[[int], float] = lambda drawn: 120.0 if drawn else 150.0,
    most: int | None = None,
) -> str:
    """A run like `source` that has measured a domain more.

    Args:
        drawn: blocks of it in each interval.
        ppl: the student's, after so many blocks of it.
        most: measurements that it has; by default all of the source's.
    """
    before = RunFolder(str(root), source)
    identity, config = before.identity(), before.config()
    assert identity is not None
    assert config is not None
    stores = {**identity["stores"], domain: {"blocks": "b", "targets": "t"}}
    folder = RunFolder(str(root), name)
    folder.claim({**identity, "stores": stores}, {**config, "run": name})
    for record in MixtureHistory(before.url).records()[:most]:
        count = drawn * record.version
        gaps = [*record.gaps, DomainGap(domain=domain, student_ppl=ppl(count), teacher_ppl=70.0)]
        _append(folder, record, gaps, {gap.domain: 1 / len(gaps) for gap in gaps}, {domain: count})
    return name


def resized(root: Path, pattern: str, factor: float, student: Path, folder: Path) -> None:
    """Copies of the runs for a student of `factor` times the width, whose losses differ by a power of that."""
    folder.mkdir()
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    for name in ("hidden_size", "intermediate_size"):
        config[name] = int(config[name] * factor)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(next(student.glob("*.safetensors")), folder)
    for name in [path.name for path in (root / "runs").iterdir() if fnmatch.fnmatch(path.name, pattern)]:
        before, after = RunFolder(str(root), name), RunFolder(str(root), f"sized-{factor:g}-{name}")
        identity, settings = before.identity(), before.config()
        assert identity is not None
        assert settings is not None
        settings = {**settings, "run": after.name, "student": {**settings["student"], "model": str(folder)}}
        after.claim({**identity, "student": {"sha": folder.name}}, settings)
        for record in MixtureHistory(before.url).records():
            gaps = [
                DomainGap(
                    domain=gap.domain,
                    student_ppl=math.exp(math.log(gap.student_ppl) + 0.2 * (factor**-0.3 - 1)),
                    teacher_ppl=gap.teacher_ppl,
                )
                for gap in record.gaps
            ]
            _append(after, record, gaps, record.probabilities)


def _append(
    folder: RunFolder,
    record: MixtureRecord,
    gaps: list[DomainGap],
    shares: dict[str, float],
    more: Mapping[str, int] | None = None,
) -> None:
    drawn = dict(record.blocks_drawn) | dict(more or {})
    MixtureHistory(folder.url).append(
        make_record(
            version=record.version,
            step=record.step,
            tokens_seen=record.tokens_seen,
            gaps=gaps,
            mixture=Mixture(probabilities=shares),
            blocks_drawn=drawn,
        )
    )
