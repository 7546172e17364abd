"""Where a run stands, on one page of Prefect's UI that is always current: the artifact `ddk-<root>-<run>-now`.

    ✓ pack → ✓ cache → **train**

and below it how far the training is, and the mixture in force. The line is written by whoever runs several stages, the
rest by the training. (Prefect lists a run's artifacts in no order that could be chosen: their ids are random. The page
`/artifacts/key/<key>` is always the newest one of a key.)
"""

from __future__ import annotations

from collections.abc import Sequence

from ddk.values import worst_first
from storage.runs.folder import RunFolder
from tasks.reporting.records import IntervalRecord
from tasks.showing.artifacts import Board, artifact_key, current_place, showing
from tasks.showing.formats import count, escape, link, markdown_table, percent, ratio

_BETWEEN = "\n\n---\n\n"


def key_of(folder: RunFolder, kind: str) -> str:
    """`'ddk-<root>-<run>-<kind>'`: runs of one name in two roots have pages of their own."""
    return artifact_key(folder.root_name, folder.name, kind)


def show_stage(folder: RunFolder, stages: Sequence[str], at: int) -> None:
    """Say which stage begins.

    Args:
        stages: in their order.
        at: index of the one that begins; the length of `stages` where all are done.
    """
    if current_place() is None:
        return
    line = " → ".join(f"✓ {one}" if i < at else f"**{one}**" if i == at else one for i, one in enumerate(stages))
    said = f"{stages[at]} is running" if at < len(stages) else "complete"
    with showing(f"where run '{folder.name}' stands"):
        Board(key_of(folder, "now"), "markdown").change(lambda old: _BETWEEN.join([line, *_parts(old)[1:]]), said)


def show_training(folder: RunFolder, records: Sequence[IntervalRecord], steps: int, said: str) -> None:
    """Say how far the training is, and which mixture holds from here.

    Args:
        records: the run's history; the newest mixture is the one in force.
        steps: that the run is to have in the end.
        said: the newest measurement in a line.
    """
    if current_place() is None:
        return
    now = records[-1]
    rows = [
        (escape(gap.domain), percent(now.mixture.probabilities[gap.domain]), ratio(gap.ratio))
        for gap in sorted(now.gaps, key=lambda gap: worst_first(gap.ratio))
    ]
    body = "\n\n".join(
        [
            f"**Step {count(now.step)} of {count(steps)}** ({percent(now.step / steps)}) at the newest measurement. "
            f"The mixture in force from there:",
            markdown_table(("domain", "sampling probability", "ratio"), rows),
            markdown_table(("", ""), [("run", link(folder.url)), ("report", link(folder.report_url))], left=2),
        ]
    )
    with showing(f"where run '{folder.name}' stands"):
        board = Board(key_of(folder, "now"), "markdown")
        board.change(lambda old: _BETWEEN.join([_parts(old)[0] or "**train**", body]), said)


def _parts(old: object) -> list[str]:
    """The line of the stages, and what is below it."""
    return str(old or "").split(_BETWEEN, 1)
