"""What is said of a law beside its numbers."""

from __future__ import annotations

from made_laws import TWO, dcpt, points

from ddk.laws.fitting import fit_all
from ddk.laws.points import by_domain
from flows.predicting.fit import size_notes

SIZES = (1e6, 3e6, 1e7)
TRUTHS = {"a": dcpt(1.5, 30.0, 0.3), "b": dcpt(1.2, 20.0, 0.5)}


def notes(truths: dict, sizes: tuple[float, ...] = SIZES) -> list[str]:
    domains = by_domain(points(truths, TWO[::2], sizes=sizes))
    return size_notes(domains, fit_all(domains, "dcpt"))


def test_sizes_that_lie_on_no_common_law_are_named() -> None:
    """The largest student was trained for less long than the others before."""
    (said,) = notes({**TRUTHS, "b": lambda n, d, r: TRUTHS["b"](n, d, r) * (1.1 if n == 1e7 else 1.0)})
    assert said.startswith("The sizes do not lie on one law: for the student of ")
    assert " % too low on 'b'" in said.replace("\N{NO-BREAK SPACE}", " ") or " too high on 'b'" in said
    assert "--runs" in said


def test_nothing_is_said_of_students_that_were_trained_alike_or_of_one() -> None:
    assert notes(TRUTHS) == []
    assert notes(TRUTHS, SIZES[:1]) == []
