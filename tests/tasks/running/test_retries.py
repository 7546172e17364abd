"""What is tried again, by Prefect itself with a real server; and what is not."""

from __future__ import annotations

import errno
from typing import Any

import botocore.exceptions
import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from storage.errors import PassingError, StoreDamagedError, UnreachableError, is_transient
from tasks.capture.cache_targets import cache_targets
from tasks.capture.import_targets import import_targets
from tasks.packing.pack_corpus import pack_corpus
from tasks.packing.pack_rows import pack_rows
from tasks.running.retries import RETRIES
from tasks.training.finish import report_run, save_final_student
from tasks.training.session import evaluate_gap, train_interval, update_mixture


def refusal(code: str, status: int) -> Exception:
    response: Any = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "PutObject")


def unreachable(cause: BaseException) -> UnreachableError:
    error = UnreachableError("s3://bucket/x: the S3 server answered something")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (unreachable(refusal("SlowDown", 503)), True),
        (unreachable(refusal("InternalError", 500)), True),
        (unreachable(refusal("TooManyRequests", 429)), True),
        (unreachable(botocore.exceptions.EndpointConnectionError(endpoint_url="http://x")), True),
        (unreachable(botocore.exceptions.ReadTimeoutError(endpoint_url="http://x")), True),
        (PassingError("as a training process has said"), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (unreachable(refusal("AccessDenied", 403)), False),
        (unreachable(refusal("NoSuchBucket", 404)), False),
        (unreachable(botocore.exceptions.NoCredentialsError()), False),
        (OSError(errno.ENOSPC, "no space left"), False),
        (OSError(errno.EIO, "input/output error"), False),
        (StoreDamagedError("a shard"), False),
        (UserError("teacher.k is 0"), False),
        (RuntimeError("the engine missed 3 positions"), False),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}"[:40] if isinstance(value, Exception) else str(value),
)
def test_what_may_pass(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


@pytest.fixture
def attempts(prefect_server: str) -> Any:
    """Runs a task that fails with an error the first `times` times; returns how often it was called, and its result."""

    def attempts(error: Exception, times: int) -> tuple[int, Any]:
        calls: list[int] = []

        @task(cache_policy=NO_CACHE, persist_result=False, **{**RETRIES, "retry_delay_seconds": 0})
        def fragile() -> str:
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "done"

        @flow(persist_result=False)
        def around() -> Any:
            return fragile(return_state=True)

        state = around(return_state=True).result(raise_on_failure=False)
        return len(calls), state.result(raise_on_failure=False) if hasattr(state, "result") else state

    return attempts


def test_storage_that_comes_back_is_asked_again(attempts: Any) -> None:
    calls, result = attempts(unreachable(refusal("SlowDown", 503)), 2)
    assert (calls, result) == (3, "done")


def test_storage_that_stays_away_fails_the_task_after_five_attempts(attempts: Any) -> None:
    calls, result = attempts(unreachable(refusal("SlowDown", 503)), 99)
    assert calls == 5
    assert isinstance(result, UnreachableError)


def test_what_will_not_pass_fails_at_once(attempts: Any) -> None:
    assert attempts(UserError("teacher.k is 0"), 1)[0] == 1
    assert attempts(unreachable(refusal("AccessDenied", 403)), 1)[0] == 1


def test_every_task_that_touches_storage_is_tried_again_with_growing_waits() -> None:
    for one in (
        *(pack_corpus, pack_rows, import_targets, cache_targets),
        *(train_interval, evaluate_gap, update_mixture, save_final_student, report_run),
    ):
        assert one.retries == 4, one.name
        assert one.retry_delay_seconds == [10, 20, 40, 80], one.name
        assert one.retry_condition_fn is not None, one.name
