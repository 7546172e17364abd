"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

SCRIPT = """
import subprocess, sys, time
from tasks.orphans import Orphans
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, start_new_session=True, stdout=subprocess.DEVNULL)
orphans = Orphans([child.pid])
print(child.pid, flush=True)
if sys.argv[1] == "close":
    orphans.close()
    orphans.close()
else:
    time.sleep(600)
"""


@pytest.mark.parametrize("ends", ["killed", "closed"])
def test_they_end_with_a_killed_parent_and_stay_once_closed(ends: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "close" if ends == "closed" else "stay"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        if ends == "killed":
            os.kill(parent.pid, signal.SIGKILL)
        parent.communicate(timeout=20)
        if ends == "killed":
            assert not psutil.wait_procs([child], timeout=20)[1]
        else:
            assert psutil.wait_procs([child], timeout=1)[1] == [child]
    finally:
        if child.is_running():
            child.kill()
