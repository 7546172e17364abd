"""Alarms for domains that a student has seen too often: a pure function of what was measured, numbers in, alarms out.

A small domain that is weighted up is read many times over, and so is one fixed set of teacher predictions. The student
then begins to learn their noise ('teacher hacking': Tiapkin et al., ICML 2025, 'On Teacher Hacking in Language Model
Distillation', arXiv 2502.02671; it does not occur on data that are always new). Three signs, by domain, each on the
domain's own validation blocks:

    ce_rises     the cross-entropy (CE) rises above its lowest while the divergence from the teacher (KL) falls: the
                 student still comes closer to the teacher, and no longer to the text
    epochs       its train blocks were read more often than `epoch_limit`; 4 by default, up to which repeated text is
                 worth nearly as much as new text (Muennighoff et al., NeurIPS 2023, 'Scaling Data-Constrained Language
                 Models', arXiv 2305.16264)
    kl_off_line  the KL leaves the straight line that it follows in log-log against the optimizer steps, and rises

What is beyond noise:

- Validation blocks are the same each time, so that a difference holds no sampling noise. What remains is the jitter of
  the student from measurement to measurement. It is estimated from the curve itself: from how far each measurement
  lies from the straight line between its neighbours, over ln step, where healthy curves are nearly straight.
- Means of three measurements that follow one another are compared: the newest three with the lowest three before them.
  A difference counts where it is larger than `REGRESSION` (1% of a perplexity, or of a KL), larger than Student's t
  allows such a jitter in one of a thousand (one of two hundred, where CE and KL must both say so), and where each of
  the newest three agrees. There must be `EARLIER` measurements before these, after step 0.
- The line is fitted to all measurements before the newest three, whose mean must lie above it by as much. A student
  that has learnt what it can leaves its line too, flat: so the KL must also have risen above its lowest.
- Neither of the two curves raises an alarm before every block was read once, nor where a domain is drawn less than half
  as often as before its lowest: what rises there is forgotten, not seen too often.

On made histories of 30 measurements that are flat or fall, with jitters of 0.3% to 3%, at most one in a hundred raises
an alarm of a curve.

An alarm depends on the measurements up to its step alone. Once raised, it stays, whatever is measured later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ddk.values import REGRESSION

AlarmKind = Literal["ce_rises", "epochs", "kl_off_line"]

EARLIER = 4
"""Measurements after step 0, besides the newest, that a judgement of a curve takes."""
_WINDOW = 3
"""Measurements in a mean."""
_SMALLEST = math.log1p(REGRESSION)
_CONFIDENCE = 0.999
_CONFIDENCE_OF_BOTH = 0.995
_DRAWN_LESS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One domain at one measurement."""

    step: int
    """Optimizer steps done."""
    ce: float
    """Mean cross-entropy per validation token, in nats: ln of the perplexity."""
    kl: float | None
    """Mean divergence from the teacher per validation token, in nats; None where it was not measured."""
    blocks_drawn: int
    """Blocks of the domain that the student had read, repeated ones included."""
    all_drawn: int
    """Blocks of all domains likewise."""
    train_blocks: int | None
    """Different blocks of the domain; None where that is not known, and then there is no alarm."""

    @property
    def epochs(self) -> float | None:
        """How often the domain's train blocks had been read, on average."""
        return None if self.train_blocks is None else self.blocks_drawn / self.train_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A domain has been seen too often."""

    domain: str
    kind: AlarmKind
    step: int
    """Optimizer steps done at the measurement that raised it."""
    sentence: str
    """What was measured, for a reader; without the domain's name and the step."""


def alarms(history: Mapping[str, Sequence[Measurement]], epoch_limit: float | None) -> tuple[Alarm, ...]:
    """Every alarm of a run so far, at most one of a kind for each domain, in the order in which they were raised.

    Args:
        history: the measurements of each domain, oldest first.
        epoch_limit: more epochs than these raise an alarm; None: no number does.
    """
    found: list[Alarm] = []
    for domain, measured in history.items():
        for kind, rule in _rules(epoch_limit).items():
            for end in range(1, len(measured) + 1):
                sentence = rule(measured[:end])
                if sentence is not None:
                    step = measured[end - 1].step
                    found.append(Alarm(domain=domain, kind=kind, step=step, sentence=sentence))
                    break
    return tuple(sorted(found, key=lambda alarm: (alarm.step, alarm.domain, alarm.kind)))


def overtrained(raised: Collection[Alarm]) -> tuple[str, ...]:
    """The domains that have an alarm, in alphabetical order."""
    return tuple(sorted({alarm.domain for alarm in raised}))


def _rules(epoch_limit: float | None) -> dict[AlarmKind, Callable[[Sequence[Measurement]], str | None]]:
    """By kind: what there is to say at the newest measurement, or None."""
    return {
        "ce_rises": _ce_rises,
        "epochs": lambda measured: _too_many_epochs(measured[-1], epoch_limit),
        "kl_off_line": _kl_off_line,
    }


def _too_many_epochs(now: Measurement, epoch_limit: float | None) -> str | None:
    if epoch_limit is None or now.epochs is None or now.epochs <= epoch_limit:
        return None
    return f"its {now.train_blocks:,} train blocks were read {now.epochs:.1f} times; the limit is {epoch_limit:g}"


def _ce_rises(measured: Sequence[Measurement]) -> str | None:
    curves = _curves(measured)
    if curves is None:
        return None
    ce, kl = curves
    at = _lowest(ce)
    if not _still_drawn(ce[at + 1].of, measured[-1]):
        return None
    ce_then, kl_then, ce_now, kl_now = (_mean(curve, place) for place in (at, -_WINDOW) for curve in (ce, kl))
    share = math.sqrt(2.0 / _WINDOW)
    risen = ce_now - ce_then > share * _noise(ce, _CONFIDENCE_OF_BOTH) and ce_now - ce_then > _SMALLEST
    fallen = kl_then - kl_now > share * _noise(kl, _CONFIDENCE_OF_BOTH) and kl_then - kl_now > _SMALLEST
    agree = all(point.y > ce_then for point in ce[-_WINDOW:]) and all(point.y < kl_then for point in kl[-_WINDOW:])
    if not (risen and fallen and agree):
        return None
    rise, fall = f"from {ce_then:.3f} to {ce_now:.3f}", f"from {math.exp(kl_then):.3f} to {math.exp(kl_now):.3f}"
    return (
        f"since step {ce[at + 1].of.step:,} the held-out cross-entropy has risen {rise} nats, while the divergence "
        f"from the teacher has fallen {fall} (means of {_WINDOW} measurements); {_times(measured[-1])}"
    )


def _kl_off_line(measured: Sequence[Measurement]) -> str | None:
    curves = _curves(measured)
    if curves is None:
        return None
    kl = curves[1]
    at = _lowest(kl)
    if not _still_drawn(kl[at + 1].of, measured[-1]):
        return None
    then, now, noise = _mean(kl, at), _mean(kl, -_WINDOW), _noise(kl, _CONFIDENCE)
    height, slope = _line(kl[:-_WINDOW])
    above = math.fsum(point.y - (height + slope * point.x) for point in kl[-_WINDOW:]) / _WINDOW
    off = above > max(_SMALLEST, noise / math.sqrt(_WINDOW))
    risen = now - then > max(_SMALLEST, noise * math.sqrt(2.0 / _WINDOW))
    if not (off and risen and all(point.y > then for point in kl[-_WINDOW:])):
        return None
    value, lowest, percent = math.exp(now), math.exp(then), 100 * math.expm1(above)
    return (
        f"the held-out divergence from the teacher is {value:.3f}, {percent:.0f}% above the line that it followed in "
        f"log-log until step {kl[-_WINDOW - 1].of.step:,}, and has risen from its lowest, {lowest:.3f} near step "
        f"{kl[at + 1].of.step:,} (means of {_WINDOW} measurements); {_times(measured[-1])}"
    )


def _times(now: Measurement) -> str:
    return f"its train blocks were read {now.epochs:.1f} times"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    of: Measurement
    x: float
    """ln step."""
    y: float


def _curves(measured: Sequence[Measurement]) -> tuple[list[_Point], list[_Point]] | None:
    """CE and ln KL against ln step, of the measurements after step 0 that have a KL above 0.

    None where there are not enough, the newest has none, or not every block had been read once, on average, at the
    first of the newest three.
    """
    if (measured[-1].epochs or 0.0) < 1.0:
        return None
    used = [(one, one.kl) for one in measured if one.step > 0 and one.kl is not None and one.kl > 0.0]
    if len(used) < EARLIER + _WINDOW or used[-1][0] is not measured[-1]:
        return None
    if (used[-_WINDOW][0].epochs or 0.0) < 1.0:
        return None
    ce = [_Point(of=one, x=math.log(one.step), y=one.ce) for one, _ in used]
    return ce, [_Point(of=one, x=math.log(one.step), y=math.log(kl)) for one, kl in used]


def _mean(curve: Sequence[_Point], first: int) -> float:
    """Of the points of the window that begins there."""
    return math.fsum(curve[first + place].y for place in range(_WINDOW)) / _WINDOW


def _lowest(curve: Sequence[_Point]) -> int:
    """Where the window with the lowest mean begins, of those before the newest."""
    return min(range(len(curve) - 2 * _WINDOW + 1), key=lambda first: _mean(curve, first))


def _still_drawn(lowest: Measurement, now: Measurement) -> bool:
    """Whether the domain has been drawn since then at least half as often, of all draws, as before."""
    since = (now.blocks_drawn - lowest.blocks_drawn) / max(1, now.all_drawn - lowest.all_drawn)
    return since >= _DRAWN_LESS * lowest.blocks_drawn / max(1, lowest.all_drawn)


def _noise(curve: Sequence[_Point], confidence: float) -> float:
    """What one measurement of a curve may be off by; a mean of n by 1/√n of that.

    A measurement's distance from the straight line (over ln step) between its neighbours has the variance
    σ²·(1 + w² + (1 − w)²), where w is the weight of the one before. Such distances overlap, so that they count as half
    as many for Student's t.
    """
    squares = []
    for before, here, after in zip(curve, curve[1:], curve[2:], strict=False):
        w = (after.x - here.x) / (after.x - before.x)
        off = here.y - (w * before.y + (1.0 - w) * after.y)
        squares.append(off**2 / (1.0 + w**2 + (1.0 - w) ** 2))
    jitter = math.sqrt(math.fsum(squares) / len(squares))
    from scipy.special import stdtrit  # takes its time to import, and few readers of a run get here

    return float(stdtrit(len(squares) / 2, confidence)) * jitter


def _line(points: Sequence[_Point]) -> tuple[float, float]:
    """Height at x = 0 and slope of the least-squares line."""
    x, y = (math.fsum(values) / len(points) for values in zip(*((p.x, p.y) for p in points), strict=True))
    slope = math.fsum((p.x - x) * (p.y - y) for p in points) / math.fsum((p.x - x) ** 2 for p in points)
    return y - slope * x, slope
