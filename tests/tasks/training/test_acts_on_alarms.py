"""What a run does about domains seen too often: as chosen, and the same from the same history."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from ddk.mixture import MixtureConfig
from ddk.train_config import LossConfig, StudentConfig, TedConfig, TrainConfig
from ddk.values import DomainGap, Mixture
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureRecord, make_record
from tasks.reporting.overtraining import alarms_of, epoch_limit_of, overtraining_rows
from tasks.reporting.run_summary import interval_records
from tasks.training import overtraining
from tasks.training.overtraining import reason_to_stop, say_alarms, with_caps
from tasks.training.run_settings import RunSettings
from tasks.training.tracking.config import TrackingConfig


def settings(**train: Any) -> RunSettings:
    return RunSettings(
        root="/nowhere",
        run="a",
        method="ddk",
        seed=0,
        student=StudentConfig(model="student"),
        loss=LossConfig(),
        train=TrainConfig(steps=40, batch_size=8, **train),
        mixture=MixtureConfig(interval=10, alpha=0.4),
        ted=TedConfig(),
        tracking=TrackingConfig(),
        trust_teacher_code=False,
    )


def record(version: int, drawn: dict[str, int], **changes: Any) -> MixtureRecord:
    """'math' has 20 train blocks, 'code' 100 and 'web' 1,000."""
    return make_record(
        version=version,
        step=10 * version,
        tokens_seen=version,
        gaps=[DomainGap(domain=domain, student_ppl=6.0, teacher_ppl=4.0) for domain in drawn],
        mixture=Mixture(probabilities={"math": 0.5, "code": 0.3, "web": 0.2}),
        blocks_drawn=drawn,
        **{"train_blocks": {"math": 20, "code": 100, "web": 1000}, "kl": dict.fromkeys(drawn, 0.5), **changes},
    )


HISTORY = [
    record(0, {"math": 0, "code": 0, "web": 0}),
    record(1, {"math": 40, "code": 24, "web": 16}),
    record(2, {"math": 81, "code": 48, "web": 31}),
    record(3, {"math": 120, "code": 401, "web": 47}),
]


def test_a_warning_changes_nothing() -> None:
    assert [one.kind for one in alarms_of(HISTORY, 4.0)] == ["epochs", "epochs"]
    assert with_caps(settings(), HISTORY[:2], HISTORY[2]) == HISTORY[2]
    assert reason_to_stop(settings(), HISTORY) is None


def test_a_cap_holds_from_its_alarm_on() -> None:
    cap = settings(overtrained="cap")
    assert with_caps(cap, HISTORY[:1], HISTORY[1]) == HISTORY[1]
    third = with_caps(cap, HISTORY[:2], HISTORY[2])
    assert third.capped == ("math",)
    # (1 − 0.4)/3 = 0.2; the others share the rest as before, 3 to 2.
    assert third.probabilities == pytest.approx({"math": 0.2, "code": 0.48, "web": 0.32})
    assert third.model_copy(update={"probabilities": HISTORY[2].probabilities, "capped": None}) == HISTORY[2]
    # Whether the record before was stored with its cap or without: the history of draws alone decides.
    fourth = with_caps(cap, [*HISTORY[:2], third], HISTORY[3])
    assert fourth == with_caps(cap, HISTORY[:3], HISTORY[3])
    assert fourth.capped == ("code", "math")
    assert fourth.probabilities == pytest.approx({"math": 0.2, "code": 0.2, "web": 0.6})
    assert reason_to_stop(cap, [*HISTORY[:2], third, fourth]) is None


def test_where_every_domain_is_capped_the_run_ends() -> None:
    all_of_it = [*HISTORY, record(4, {"math": 121, "code": 402, "web": 4001})]
    reason = reason_to_stop(settings(overtrained="cap"), all_of_it)
    assert reason == ("train.overtrained is cap, and every domain was seen too often: no other is left to draw instead")


def test_a_stop_says_why() -> None:
    stop = settings(overtrained="stop")
    assert reason_to_stop(stop, HISTORY[:2]) is None
    assert reason_to_stop(stop, HISTORY[:3]) == (
        "train.overtrained is stop, and a domain was seen too often: step 20, math: its 20 train blocks were read 4.0 "
        "times; the limit is 4"
    )
    assert reason_to_stop(settings(overtrained="stop", epoch_limit=None), HISTORY) is None


def test_records_of_an_older_version_raise_none() -> None:
    older = [one.model_copy(update={"train_blocks": None, "kl": None}) for one in HISTORY]
    assert alarms_of(older, 4.0) == ()
    assert epoch_limit_of({"train": {"steps": 3}}) == epoch_limit_of(None) == 4.0
    assert epoch_limit_of({"train": {"epoch_limit": None}}) is None


def test_each_alarm_is_said_once_as_a_warning_and_an_event(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        overtraining, "say_event", lambda name, run, evaluation, payload: events.append((name, payload))
    )
    monkeypatch.setattr(logging.getLogger("ddk"), "propagate", True)
    run = RunFolder("/nowhere", "a")
    for end in range(1, 5):
        say_alarms(settings(), run, HISTORY[:end])
    assert [(name, payload["domain"], payload["kind"], payload["step"]) for name, payload in events] == [
        ("domain.overtrained", "math", "epochs", 20),
        ("domain.overtrained", "code", "epochs", 30),
    ]
    assert events[0][1]["sentence"] == "its 20 train blocks were read 4.0 times; the limit is 4"
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert [one.partition(": its")[0] for one in warnings] == [
        "seen too often: step 20, math",
        "seen too often: step 30, code",
    ]


def test_the_table_of_the_newest_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.reporting import run_summary

    capped = with_caps(settings(overtrained="cap"), HISTORY[:3], HISTORY[3])
    monkeypatch.setattr(
        run_summary, "MixtureHistory", lambda url: type("", (), {"whole": lambda self, done: [*HISTORY[:3], capped]})()
    )
    folder = type("", (), {"url": "", "summary": lambda self: None, "config": lambda self: None})()
    records = interval_records(folder)
    assert [len(one.alarms) for one in records] == [0, 0, 1, 1]
    assert overtraining_rows(records) == [
        {
            "domain": "math",
            "epochs": "6.00",
            "held-out cross-entropy": "1.7918",
            "held-out KL": "0.5000",
            "seen too often": "step 20: its 20 train blocks were read 4.0 times; the limit is 4",
            "share": "capped",
        },
        {
            "domain": "code",
            "epochs": "4.01",
            "held-out cross-entropy": "1.7918",
            "held-out KL": "0.5000",
            "seen too often": "step 30: its 100 train blocks were read 4.0 times; the limit is 4",
            "share": "capped",
        },
        {
            "domain": "web",
            "epochs": "0.05",
            "held-out cross-entropy": "1.7918",
            "held-out KL": "0.5000",
            "seen too often": "–",
            "share": "free",
        },
    ]
    assert overtraining_rows([replace(one, kl={}) for one in records])[2]["held-out KL"] == "–"
