"""Code that is killed (-9) at one rename after another, so that a test can see what each death leaves.

Whatever is written gets its name by `os.replace`, so just before one of them is the worst moment for a process to die.
"""

from __future__ import annotations

import subprocess
import sys

from repository import REPOSITORY


def killed_at_each_rename(
    code: str, folders: str, *, imports: tuple[str, ...], first: int = 1, every: int = 1
) -> list[int]:
    """Runs Python code again and again, each time in a process that is killed just before one of its renames.

    Args:
        code: finds the variable `folder`: `<folders>/<n>` in the process that dies at rename n.
        imports: modules that the code needs and that are slow to import; none may start a thread.
        first: the rename at which the first process dies; the next dies `every` renames later, and so on.

    Returns:
        The renames at which one died; the process after them ran to its end.
    """
    command = [sys.executable, "-c", _DRIVER, code, folders, str(first), str(every), *imports]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return list(range(first, int(done.stdout), every))


# One process imports; a fork of it is what dies. Nothing has started a thread by then.
_DRIVER = """
import importlib
import os
import signal
import sys

text, folders, first, every, *imports = sys.argv[1:]
for name in imports:
    importlib.import_module(name)
code = compile(text, "<code>", "exec")
replace = os.replace
rename = int(first)
while True:
    child = os.fork()
    if child == 0:
        renames = 0

        def dying(source, target):
            global renames
            renames += 1
            if renames == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        exec(code, {"folder": f"{folders}/{rename}"})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    rename += int(every)
print(rename)
"""
