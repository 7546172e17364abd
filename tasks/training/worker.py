"""What torchrun starts on every device: `torchrun … -m tasks.training.worker JOB`. No Prefect here.

JOB is a file with a `TrainingJob` as JSON. Rank 0 takes commands from the flow's process through the socket that
`DDK_TRAIN_SOCKET` names, a line of JSON each, and passes them on to the other ranks; all then do the same.

    {"do": "train", "probabilities": {...}, "version": 3, "steps": 1000}
    {"do": "hold out"}    {"do": "measure", "sample": {...}}
    {"do": "save"}    {"do": "export", "folder": "..."}    {"do": "stop"}

What goes back, a line of JSON each: {"log": "..."}, {"step": {...}} while it trains, and after each command (and once
at the beginning) {"done": result, "state": {...}}, or {"error": "...", "kind": "..."}, after which all is over.

When the flow's process is gone, so is the socket, and rank 0 ends; torchrun then ends the others.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import asdict
from typing import IO, Any

from ddk.parallel import World, join_world, leave_world
from ddk.trainer import resolve_device
from ddk.values import Mixture
from storage.errors import is_transient
from tasks.running.plain_errors import user_error
from tasks.training.job import TrainingJob
from tasks.training.rank import RankTraining
from tasks.training.rank_state import state_as_json

SOCKET = "DDK_TRAIN_SOCKET"


class Channel:
    """Rank 0's end of the socket; on other ranks nothing is heard and nothing said."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lines: IO[str] | None = None
        if world.is_first:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(os.environ[SOCKET])
            self._lines = connection.makefile("rw", encoding="utf-8")

    def say(self, message: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(message) + "\n")
            self._lines.flush()

    def next(self) -> dict[str, Any]:
        """The next command, on every rank; 'stop' if the flow's process is gone."""
        line = self._lines.readline() if self._lines is not None else None
        command: dict[str, Any] = json.loads(self._world.from_first(line) or '{"do": "stop"}')
        return command


def end_with_torchrun() -> None:
    """Let the kernel kill this process when the one that started it ends, however: torchrun gives its workers sessions
    of their own, and one that waits for a killed rank would hold its GPU for as long as the wait's time-out."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it had ended before
            os._exit(1)


def main(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        job = TrainingJob.model_validate_json(file.read())
    world = join_world("cuda" if resolve_device(job.train).type == "cuda" else "cpu")
    channel = Channel(world)
    try:
        training = RankTraining(job, world, lambda line: channel.say({"log": line}))
        channel.say({"done": None, "state": state_as_json(training.state)})
        while (command := channel.next())["do"] != "stop":
            result = _obey(command, training, channel)
            channel.say({"done": result, "state": state_as_json(training.state)})
    except FloatingPointError as error:
        channel.say({"error": str(error), "kind": "diverged"})
        return 1
    except Exception as error:
        wrong = user_error(error)
        if wrong is None:
            raise
        channel.say({"error": str(wrong), "kind": "passing" if is_transient(error) else "user"})
        return 1
    leave_world(world)
    return 0


def _obey(command: dict[str, Any], training: RankTraining, channel: Channel) -> Any:
    match command["do"]:
        case "train":
            training.train_interval(
                Mixture(probabilities=command["probabilities"]),
                command["version"],
                command["steps"],
                lambda report: channel.say({"step": asdict(report)}),
            )
        case "measure":
            return training.perplexities(command.get("sample"))
        case "hold out":
            return {domain: asdict(one) for domain, one in training.held_out().items()}
        case "save":
            training.save()
        case "export":
            training.export(command["folder"])
        case other:
            raise ValueError(f"there is no command '{other}'")
    return None


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    end_with_torchrun()
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # see leave_world
