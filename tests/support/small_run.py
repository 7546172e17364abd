"""A small run as a user starts it: the real command, the real engine, real files."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import yaml
from repository import REPOSITORY

ASSETS = REPOSITORY / "flows" / "presets" / "quickstart"
DOMAINS = ("math", "code", "zh_books")


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


class Ddk:
    """Runs `ddk`: in this process where the test reads what it says and does, in one of its own where it is killed, or
    where the process itself is looked at. An own process takes ten seconds more, to import what this one has.

    Args:
        home: of Prefect, for processes.
        api_url: of a server to report to; without one every process starts its own for its time, as for a newcomer.
    """

    def __init__(self, home: Path, api_url: str | None = None) -> None:
        self._prefect = {"PREFECT_HOME": str(home)} | ({"PREFECT_API_URL": api_url} if api_url else {})

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *arguments],
            env={**os.environ, **self._prefect, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a kill takes the engine and the ephemeral server along
        )

    def __call__(self, *arguments: str) -> Finished:
        """The command in this process; what it changes of the process is put back."""
        from flows.__main__ import main

        out, err, code = io.StringIO(), io.StringIO(), 0
        ours = logging.getLogger("ddk")
        handlers, level, raises = list(ours.handlers), ours.level, logging.raiseExceptions
        with (
            mock.patch.dict(os.environ),
            mock.patch.object(sys, "argv", ["ddk", *arguments]),
            warnings.catch_warnings(action="ignore"),  # as PYTHONWARNINGS has it, which the command sets for itself
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            finally:
                ours.handlers[:], logging.raiseExceptions = handlers, raises
                ours.setLevel(level)
        return Finished(code, out.getvalue(), err.getvalue())

    def refusal(self, *arguments: str) -> str:
        """The one line in which the command, in this process, says what its user got wrong."""
        done = self(*arguments)
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        lines = [line for line in done.err.splitlines() if line.startswith("ddk: ")]
        assert len(lines) == 1, done.err
        return lines[0]

    def process(self, *arguments: str, timeout: float = 400) -> Finished:
        """The command in a process of its own, to its end."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"ddk {arguments} hung:\n{out}\n{err}") from None
        return Finished(process.returncode, out, err)

    def kill_when(self, condition: Callable[[], bool], *arguments: str, timeout: float = 300) -> list[psutil.Process]:
        """Start the command, kill -9 its process as soon as the condition holds.

        Returns:
            The processes that it had started; nobody has killed these.
        """
        process = self.start(*arguments)
        deadline = time.monotonic() + timeout
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"ddk {arguments} ended before it could be killed:\n{process.communicate()}")
            time.sleep(0.002)
        started = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # Not read to the end: what the command had started may hold the pipes open.
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        return started


def small_config(**changes: Any) -> dict[str, Any]:
    """Three domains of the quickstart, a few blocks each, six steps in three intervals.

    `changes` replace or extend sections; a domain that is None is left out.
    """
    suffixes = {"code": "zst"}
    config: dict[str, Any] = {
        "run": "small",
        "root": "./root",
        "domains": {
            domain: {
                "train": f"{ASSETS}/corpora/{domain}/train.jsonl.{suffixes.get(domain, 'gz')}",
                "validation": f"{ASSETS}/corpora/{domain}/validation.jsonl.{suffixes.get(domain, 'gz')}",
                "max_train_blocks": 40,
                "max_validation_blocks": 6,
            }
            for domain in DOMAINS
        },
        "packing": {"seq_len": 96},
        "teacher": {"model": str(ASSETS / "teacher"), "k": 16, "dtype": "float32", "shard_blocks": 8},
        "student": {"model": str(ASSETS / "student")},
        "train": {
            "steps": 6,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 2,
            "keep_checkpoints": 9,
        },
        "mixture": {"interval": 2, "alpha": 0.5},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    config["domains"] = {name: domain for name, domain in config["domains"].items() if domain is not None}
    return config


def write_config(folder: Path, **changes: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(**changes)), encoding="utf-8")
    return str(path)


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of every file, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class SmallRun:
    config: str
    root: Path
    output: Finished

    @property
    def run(self) -> Path:
        return self.root / "runs" / "small"
