"""What Prefect logs of a run that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from botocore.exceptions import ClientError
from prefect import flow, task

from ddk.errors import LostPartError, UserError
from tasks.running.plain_errors import plain_errors

DENIED = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "PutObject")


@pytest.fixture
def records(prefect_server: str) -> Iterator[list[logging.LogRecord]]:
    plain_errors()
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"prefect.{name}") for name in ("task_runs", "flow_runs")]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


def fail(error: Exception) -> None:
    @task
    def stage() -> None:
        raise error

    @flow
    def pipeline() -> None:
        stage()

    with pytest.raises(type(error)):
        pipeline()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("teacher.k is 9; lower it"), "teacher.k is 9"),
        (LostPartError("the engine's process was killed by signal 9"), "killed by signal 9"),
        (DENIED, "AccessDenied"),
    ],
)
def test_a_mistake_is_one_line_for_the_task_and_one_for_the_flow(
    records: list[logging.LogRecord], error: Exception, says: str
) -> None:
    fail(error)
    said = [record.getMessage() for record in records if says in record.getMessage()]
    assert {logger.name for logger in records} >= {"prefect.task_runs", "prefect.flow_runs"}
    assert len(said) >= 2
    assert not any(record.exc_info for record in records)


def test_what_else_fails_keeps_its_traceback(records: list[logging.LogRecord]) -> None:
    fail(ZeroDivisionError("what nobody thought of"))
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in records)
