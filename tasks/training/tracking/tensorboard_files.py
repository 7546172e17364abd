"""TensorBoard's event files in the run's folder, whole files only: an object store appends to none.

    <run>/tensorboard/events.out.tfevents.00000000.gap-00000    the gap before any training
                      events.out.tfevents.00000000.train        the steps of the interval that begins there
                      events.out.tfevents.00001000.gap-00001    measured after 1,000 steps
                      events.out.tfevents.00001000.train        …

A file is a function of what the run has stored, written in one atomic step, so that an interval that is trained again
replaces its own. TensorBoard reads a folder's files by name, and one of its loaders never goes back to a name before
the newest that it has read. So a name begins with the steps that the training had done when the file was written; a gap
that another evaluator measured late then comes after the intervals that were trained meanwhile.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from storage.files.uri import join, list_names, write_bytes
from storage.runs.folder import RunFolder
from storage.runs.listing import records_of_contents
from tasks.training.tracking.points import Point, RunPoints

_PREFIX = "events.out.tfevents"


class TensorBoardTracker:
    """Writes the files that the folder lacks."""

    name = "TensorBoard"

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._url = join(folder.url, "tensorboard")

    def log(self, points: RunPoints) -> None:
        there = {name.removeprefix(_PREFIX) for name in list_names(self._url)}
        for first in points.intervals:
            name = f".{first:08d}.train"
            if name not in there or first == points.trained_from:
                self._write(name, points.interval(first))
        versions = {name.rpartition(".gap-")[2] for name in there}
        for record in points.gaps:
            if (version := f"{record.version:05d}") not in versions:
                self._write(f".{points.upto:08d}.gap-{version}", [points.gap(record)])

    def _write(self, name: str, points: Sequence[Point]) -> None:
        if points:
            content = event_file(points)
            write_bytes(join(self._url, _PREFIX + name), content)
            self._folder.curves_listing.add(records_of_contents({_PREFIX + name: content}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        pass


def event_file(points: Sequence[Point]) -> bytes:
    """The content of an event file; the same points give the same bytes."""
    # Imported here: `ddk --help` need not wait for it. Neither of these looks for TensorFlow.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    # The version that tells a reader not to take a smaller step for a restart that makes the rest void.
    writer.write(Event(wall_time=points[0].time, file_version="brain.Event:2").SerializeToString())
    for point in points:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in sorted(point.values.items())]
        event = Event(wall_time=point.time, step=point.step, summary=Summary(value=values))
        writer.write(event.SerializeToString(deterministic=True))
    return content.getvalue()
