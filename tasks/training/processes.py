"""A student in training on several devices, seen from the flow's process: torchrun's workers behind one socket.

The workers (`tasks.training.worker`) live as long as the flow trains, so that a new mixture costs only a message, not a
restart. Their log lines go to the flow's log. They always end when this process ends, even if it is killed
(`tasks.running.descendants`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ddk.errors import LostPartError, UserError
from ddk.gap import HeldOut
from ddk.train_config import TrainConfig
from ddk.trainer import StepReport, TrainerState, resolve_device, resolve_processes
from ddk.values import Mixture
from storage.errors import PassingError
from storage.files.settings import as_environment
from tasks.running.descendants import Descendants
from tasks.showing.progress import logger
from tasks.training.job import TrainingJob
from tasks.training.rank import OnStep
from tasks.training.rank_state import state_from_json
from tasks.training.worker import SOCKET

_ERRORS: dict[str, type[Exception]] = {"diverged": FloatingPointError, "passing": PassingError, "user": UserError}
"""By the `kind` that a worker says."""
_SECONDS_TO_END = 20.0
_LINES_KEPT = 30


class TrainingProcesses:
    """`tasks.training.rank.Training` by `processes` workers on this machine, and those of the other nodes.

    Raises:
        UserError: the workers report an error that the user can fix.
    LostPartError: they could not start, or have ended without an error.
    """

    def __init__(self, job: TrainingJob, processes: int) -> None:
        self._last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._at_work = True
        """Whether the workers are starting, or busy with what they were asked for last, and would not hear a word."""
        self._descendants = Descendants()
        self._folder = tempfile.TemporaryDirectory(prefix="ddk-train-")
        path = os.path.join(self._folder.name, "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            self._process = start_workers(job, processes, 0, self._folder.name, path, self._descendants)
            self._log = threading.Thread(target=self._read_log, name="ddk-train-log", daemon=True)
            self._log.start()
            try:
                self._lines = self._accepted(listener)
                self.state: TrainerState = self._result()[1]
            except BaseException:
                self.close()
                raise

    def train_interval(self, mixture: Mixture, version: int, steps: int, on_step: OnStep) -> None:
        self._send(do="train", probabilities=dict(mixture.probabilities), version=version, steps=steps)
        self.state = self._result(on_step)[1]

    def perplexities(self, sample: Mapping[str, int] | None = None) -> dict[str, float]:
        self._send(do="measure", sample=None if sample is None else dict(sample))
        return dict(self._result()[0])

    def held_out(self) -> dict[str, HeldOut]:
        self._send(do="hold out")
        return {domain: HeldOut(**one) for domain, one in self._result()[0].items()}

    def save(self) -> None:
        self._send(do="save")
        self._result()

    def export(self, folder: str) -> None:
        self._send(do="export", folder=folder)
        self._result()

    def close(self) -> None:
        """End the workers: by word, or by kill where they are at work, as after an error or an interruption. Harmless
        when called twice."""
        seconds = 0.0 if self._at_work else _SECONDS_TO_END
        if not self._at_work:
            with contextlib.suppress(OSError, LostPartError):
                self._send(do="stop")
        self._end(seconds)
        self._folder.cleanup()

    def _end(self, seconds: float) -> int:
        """torchrun's exit code; it and its workers have so long to end by themselves."""
        self._descendants.close(seconds)
        self._log.join(timeout=5)
        return self._process.wait()

    def _accepted(self, listener: socket.socket) -> IO[str]:
        listener.settimeout(1.0)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if self._process.poll() is not None:
                    raise self._ended() from None
                continue
            connection.settimeout(None)
            return connection.makefile("rw", encoding="utf-8")

    def _send(self, **command: Any) -> None:
        self._at_work = True
        try:
            self._lines.write(json.dumps(command) + "\n")
            self._lines.flush()
        except (BrokenPipeError, ConnectionError):
            raise self._ended() from None

    def _result(self, on_step: OnStep = lambda report: None) -> tuple[Any, TrainerState]:
        """Of the command that was sent last: what it gave, and where the training stands after it."""
        try:
            for line in self._lines:
                if not line.endswith("\n"):  # killed in the middle of it
                    break
                message = json.loads(line)
                if "log" in message:
                    logger.info(message["log"])
                elif "step" in message:
                    on_step(StepReport(**message["step"]))
                elif "error" in message:
                    raise _ERRORS[message["kind"]](message["error"])
                else:
                    self._at_work = False
                    return message["done"], state_from_json(message["state"], "what the training processes say")
        except ConnectionResetError:
            pass
        raise self._ended()

    def _ended(self) -> LostPartError:
        """What to say where the workers are gone without a word."""
        return _lost(self._end(_SECONDS_TO_END), self._last_lines)

    def _read_log(self) -> None:
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            self._last_lines.append(line.rstrip())
            logger.debug("train: %s", line.rstrip())


def start_workers(
    job: TrainingJob, processes: int, node_rank: int, folder: str, socket_path: str | None, descendants: Descendants
) -> subprocess.Popen[str]:
    """torchrun with this machine's workers, in a process group of its own.

    Args:
        folder: a local folder for the job's file.
        socket_path: where rank 0 finds the flow's process; None on all machines but the first.
        descendants: those whose one it is to be.
    """
    path = os.path.join(folder, "job.json")
    with open(path, "w", encoding="utf-8") as file:
        file.write(job.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", *_rendezvous(job.train, node_rank)]
    command += ["--nproc-per-node", str(processes), "-m", "tasks.training.worker", path]
    # torchrun would set one thread a process; here the cores are shared out.
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **as_environment(), **descendants.environment}
    if socket_path is not None:
        environment[SOCKET] = socket_path
    return subprocess.Popen(  # noqa: S603
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def join_training(job: TrainingJob, node_rank: int) -> None:
    """Run this machine's workers of a training that another leads, until it ends.

    Args:
        node_rank: 1 to `train.nodes` − 1; the leading machine is 0.

    Raises:
        UserError: there is no such place.
        LostPartError: the workers ended with an error.
    """
    if not 1 <= node_rank < job.train.nodes:
        raise UserError(f"--node-rank is {node_rank} and train.nodes {job.train.nodes}; it must be 1 to nodes - 1")
    with tempfile.TemporaryDirectory(prefix="ddk-train-") as folder:
        processes = resolve_processes(job.train, resolve_device(job.train))
        descendants = Descendants()
        last: deque[str] = deque(maxlen=_LINES_KEPT)
        try:
            process = start_workers(job, processes, node_rank, folder, None, descendants)
            for line in process.stdout or ():
                last.append(line.rstrip())
            code = process.wait()
        finally:
            descendants.close()
    if code:
        raise _lost(code, last)


def _lost(code: int, lines: Sequence[str]) -> LostPartError:
    """What to say of workers that ended without a word: the signal, where torchrun or the kernel names one, and else
    their last lines."""
    again = "Saved checkpoints are intact: then run the same command again"
    said = "\n".join(lines)
    # torchrun ends the others when one is killed, and names the first to end last.
    killed = re.search(r"Signal (\d+) \(\w+\) received by PID", said.rpartition("Root Cause")[2])
    number = int(killed[1]) if killed else -code
    if number > 0:
        why = "its log (--debug) and `dmesg` say more"
        if number == signal.SIGKILL:
            why = (
                "probably the machine was out of memory (`dmesg` says so): lower train.micro_batch_size or "
                "train.processes"
            )
        return LostPartError(f"a training process was killed by signal {number}; {why}. {again}")
    return LostPartError(f"the training processes ended (exit code {code}). {again}. Their last lines:\n{said}")


def _rendezvous(train: TrainConfig, node_rank: int) -> Sequence[str]:
    if train.nodes == 1:
        return ["--standalone", "--nnodes", "1"]
    host, _, port = train.rendezvous.rpartition(":")
    return [
        *("--nnodes", str(train.nodes), "--node-rank", str(node_rank)),
        *("--master-addr", host, "--master-port", port),
    ]
