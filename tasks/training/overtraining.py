"""What a run does about domains that it has seen too often: `train.overtrained`.

Everything follows from the mixture history, so that a run which resumes, or whose gap is measured elsewhere, does the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

from ddk.methods.registry import smallest_mixture
from ddk.mixture import capped_mixture
from ddk.overtraining import Alarm, overtrained
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureRecord
from tasks.reporting.overtraining import alarms_of, said
from tasks.showing.events import say_event
from tasks.showing.progress import logger
from tasks.training.run_settings import RunSettings


def with_caps(settings: RunSettings, past: Sequence[MixtureRecord], record: MixtureRecord) -> MixtureRecord:
    """The record that follows `past`, its mixture limited on the domains with alarms where the run is to cap them.

    A domain that was capped once stays so: its alarm stays. Its probability is at most the floor of the mixture.
    """
    if settings.train.overtrained != "cap":
        return record
    names = overtrained(alarms_of([*past, record], settings.train.epoch_limit))
    if not names:
        return record
    floor = smallest_mixture(settings.method, settings.mixture, record.train_blocks or {})
    mixture = capped_mixture(record.mixture, {domain: floor[domain] for domain in names})
    return record.model_copy(update={"probabilities": dict(mixture.probabilities), "capped": names})


def reason_to_stop(settings: RunSettings, records: Sequence[MixtureRecord]) -> str | None:
    """Why the run ends here, where it is to end for what it has seen too often; else None."""
    found = alarms_of(records, settings.train.epoch_limit)
    if settings.train.overtrained == "stop" and found:
        return f"train.overtrained is stop, and a domain was seen too often: {said(found[0])}"
    if settings.train.overtrained == "cap" and records and set(overtrained(found)) == set(records[-1].probabilities):
        return "train.overtrained is cap, and every domain was seen too often: no other is left to draw instead"
    return None


def say_alarms(settings: RunSettings, run: RunFolder, records: Sequence[MixtureRecord]) -> None:
    """A warning in the log and an event for each alarm that the newest record has raised."""
    for alarm in alarms_of(records, settings.train.epoch_limit):
        if alarm.step == records[-1].step:
            logger.warning("seen too often: %s%s", said(alarm), _what_follows(settings, alarm, records[-1]))
            say_event(
                "domain.overtrained",
                run,
                settings.mixture.evaluation,
                {
                    "domain": alarm.domain,
                    "kind": alarm.kind,
                    "step": alarm.step,
                    "sentence": alarm.sentence,
                    "message": f"Run {run.name}: {said(alarm)}. {run.report_url}/index.html",
                },
            )


def _what_follows(settings: RunSettings, alarm: Alarm, record: MixtureRecord) -> str:
    match settings.train.overtrained:
        case "stop":
            return "; the run ends here (train.overtrained: stop)"
        case "cap":
            return f"; drawn at most at {record.probabilities[alarm.domain]:.3f} from here (train.overtrained: cap)"
        case _:
            return "; train.overtrained: cap or stop would act on it"
