"""What takes longer than a glance says what it is doing, instead of being silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.showing.formats import duration
from tasks.showing.progress import logger

SECONDS_OF_SILENCE = 3.0


@contextmanager
def said_if_slow(what: str) -> Iterator[None]:
    """Log what is going on once it takes longer than three seconds, and then at each doubling of the time.

    Example: `with said_if_slow("starting vLLM"):` logs "starting vLLM …", and later "starting vLLM … (12.0 s so far)".
    """
    over = threading.Event()
    watcher = threading.Thread(target=_say, args=(what, over), name="ddk-said-if-slow", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _say(what: str, over: threading.Event) -> None:
    started, pause = time.monotonic(), SECONDS_OF_SILENCE
    if over.wait(pause):
        return
    logger.info("%s …", what)
    while not over.wait(pause := 2 * pause):
        logger.info("%s … (%s so far)", what, duration(time.monotonic() - started))
