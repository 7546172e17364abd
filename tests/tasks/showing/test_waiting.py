from __future__ import annotations

import logging
import threading
import time

import pytest

from tasks.showing import waiting


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_what_is_quick_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ddk"), waiting.said_if_slow("starting"):
        assert "ddk-said-if-slow" in names()
    assert caplog.messages == []
    assert "ddk-said-if-slow" not in names()


def test_what_takes_long_says_so_ever_more_rarely(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "SECONDS_OF_SILENCE", 0.05)
    with caplog.at_level(logging.INFO, logger="ddk"), waiting.said_if_slow("starting"):
        while len(caplog.messages) < 3:  # at 0.05, 0.15 and 0.35 s
            time.sleep(0.01)
    said = list(caplog.messages)
    assert said[0] == "starting …"
    assert all(line.startswith("starting … (") and line.endswith(" s so far)") for line in said[1:])


def test_an_error_ends_it_too(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), waiting.said_if_slow("starting"):
        raise KeyError
    assert "ddk-said-if-slow" not in names()
