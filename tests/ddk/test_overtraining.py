"""The alarms for domains seen too often: on made histories, and on a student that does overtrain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from fake_data import Blocks, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk.data import TrainData
from ddk.methods.registry import smallest_mixture
from ddk.mixture import MixtureConfig, capped_mixture
from ddk.overtraining import Alarm, Measurement, alarms, overtrained
from ddk.train_config import LossConfig, TrainConfig
from ddk.trainer import Trainer
from ddk.values import Mixture, SparseTargets

Curve = Callable[[float], float]


def made(
    ce: Curve,
    kl: Curve,
    *,
    measurements: int = 24,
    every: int = 10,
    epochs_each: float = 0.9,
    jitter: float = 0.0,
    seed: int = 0,
    share: Curve = lambda step: 0.5,
) -> list[Measurement]:
    """A history from step 0 on; the share is that of the blocks drawn since the measurement before."""
    random = np.random.default_rng(seed)
    drawn = whole = 0.0
    found = []
    for number in range(measurements + 1):
        step = every * number
        if number:
            drawn, whole = drawn + 1000.0 * share(step), whole + 1000.0
        at = max(1.0, step)
        found.append(
            Measurement(
                step=step,
                ce=ce(at) + jitter * float(random.standard_normal()),
                kl=kl(at) * math.exp(jitter * float(random.standard_normal())),
                blocks_drawn=round(drawn),
                all_drawn=round(whole),
                train_blocks=round(500.0 / epochs_each),
            )
        )
    return found


def kinds(history: list[Measurement], epoch_limit: float | None = None) -> dict[str, int]:
    return {alarm.kind: alarm.step for alarm in alarms({"a": history}, epoch_limit)}


def falling(step: float) -> float:
    return 2.0 * step**-0.4


def settling(step: float) -> float:
    return 0.3 + 2.0 * step**-0.6


def turning(step: float) -> float:
    """Falls in a straight line of log-log up to step 100, and rises as steeply from there."""
    return 2.0 * min(step, 100.0) ** -0.4 * max(1.0, step / 100.0) ** 0.4


HEALTHY = {"falling": falling, "settling": settling, "learnt": lambda step: 0.5}


@pytest.mark.parametrize("curve", HEALTHY.values(), ids=HEALTHY)
@pytest.mark.parametrize("jitter", [0.0, 0.003, 0.03])
def test_a_healthy_history_raises_none(curve: Curve, jitter: float) -> None:
    """Though its blocks are read 21 times: only the curves are judged."""
    raised = [kinds(made(lambda s: 2.0 + curve(s), curve, jitter=jitter, seed=seed)) for seed in range(8)]
    assert raised == [{}] * 8


def test_the_epochs_are_counted() -> None:
    history = made(falling, falling, epochs_each=0.5)
    assert kinds(history, 4.0) == {"epochs": 90}  # 4.0 at step 80 are within the limit
    assert kinds(history, 12.0) == {}
    assert kinds(history, None) == {}
    (alarm,) = alarms({"a": history}, 4.0)
    assert alarm.sentence == "its 1,000 train blocks were read 4.5 times; the limit is 4"


def test_a_kl_that_turns_leaves_its_line() -> None:
    history = made(lambda s: 2.0 + turning(s), turning)
    assert list(kinds(history)) == ["kl_off_line"]
    step = kinds(history)["kl_off_line"]
    assert 120 <= step <= 160
    (alarm,) = alarms({"a": history}, None)
    kl = np.array([one.kl for one in history[1:]])
    at, now = 9, step // 10 - 1  # of the lowest and of the alarm's own measurement
    assert f"its lowest, {np.exp(np.log(kl[at - 1 : at + 2]).mean()):.3f} near step 100 " in alarm.sentence
    x = np.log([one.step for one in history[1:]])
    line = np.polyfit(x[: now - 2], np.log(kl[: now - 2]), 1)
    above = np.mean(np.log(kl[now - 2 : now + 1]) - np.polyval(line, x[now - 2 : now + 1]))
    assert f"{100 * np.expm1(above):.0f}% above the line that it followed in log-log until step {step - 30} " in (
        alarm.sentence.replace(",", " ")
    )


def test_a_ce_that_rises_while_the_kl_falls_is_named() -> None:
    history = made(lambda s: 2.0 + turning(s), falling)
    assert list(kinds(history)) == ["ce_rises"]
    assert 120 <= kinds(history)["ce_rises"] <= 160
    assert "since step 100 the held-out cross-entropy has risen" in alarms({"a": history}, None)[0].sentence
    assert kinds(made(lambda s: 2.0 + turning(s), lambda s: 0.5)) == {}


@pytest.mark.parametrize("jitter", [0.003, 0.01])
def test_a_turn_is_seen_through_noise_but_later(jitter: float) -> None:
    for seed in range(5):
        history = made(lambda s: 2.0 + turning(s), turning, jitter=jitter, seed=seed)
        assert kinds(history)["kl_off_line"] <= 240


def test_one_measurement_that_is_off_is_no_alarm() -> None:
    blip = made(lambda s: 2.0 + falling(s) + 0.3 * (s == 150), lambda s: falling(s) * (1.5 if s == 150 else 1.0))
    assert kinds(blip) == {}


def test_before_every_block_was_read_once_nothing_is_seen_too_often() -> None:
    assert kinds(made(lambda s: 2.0 + turning(s), turning, epochs_each=0.04)) == {}
    assert kinds(made(lambda s: 2.0 + turning(s), falling, epochs_each=0.04)) == {}


def test_what_is_drawn_less_is_forgotten_and_raises_none() -> None:
    history = made(lambda s: 2.0 + turning(s), turning, share=lambda step: 0.5 if step <= 100 else 0.1)
    assert kinds(history) == {}


def test_without_targets_only_the_epochs_count_and_without_sizes_nothing() -> None:
    history = made(lambda s: 2.0 + turning(s), turning)

    def without(**missing: None) -> list[Measurement]:
        names = Measurement.__dataclass_fields__
        return [Measurement(**{name: getattr(one, name) for name in names} | missing) for one in history]

    assert set(kinds(history, 4.0)) == {"epochs", "kl_off_line"}
    assert set(kinds(without(kl=None), 4.0)) == {"epochs"}
    assert kinds(without(train_blocks=None), 4.0) == {}


def test_alarms_depend_on_what_was_measured_until_then() -> None:
    history = {
        "a": made(lambda s: 2.0 + turning(s), turning, jitter=0.003),
        "b": made(lambda s: 2.0 + turning(s), falling, jitter=0.003, seed=1),
    }
    whole = alarms(history, 4.0)
    assert [alarm.step for alarm in whole] == sorted(alarm.step for alarm in whole)
    assert overtrained(whole) == ("a", "b")
    for end in range(1, 26):
        so_far = alarms({domain: one[:end] for domain, one in history.items()}, 4.0)
        assert so_far == tuple(alarm for alarm in whole if alarm.step <= 10 * (end - 1))


# Measured histories: every 5 steps, the student of the quickstart on 20 blocks of its domain 'math', drawn half of the
# time (γ = 2); and every 30 steps, the quickstart on 'code', which it draws most.
CE_OF_20_BLOCKS = """
    5.1058 5.0895 5.0779 5.0806 5.0737 5.0532 5.0416 5.0416 5.0627 5.0649 5.0816 5.0905 5.0989 5.1192
    5.1365 5.1426 5.1480 5.1631 5.1796 5.1866 5.1904 5.1925 5.2037 5.2066 5.2094 5.2151 5.2187 5.2208
    5.2233 5.2241 5.2252
"""
KL_OF_20_BLOCKS = """
    1.1480 1.1262 1.0969 1.0808 1.0671 1.0404 1.0126 0.9951 0.9963 0.9864 0.9849 0.9852 0.9896 0.9879
    0.9916 0.9979 0.9945 0.9989 1.0031 1.0006 0.9998 1.0030 1.0089 1.0085 1.0080 1.0092 1.0097 1.0101
    1.0109 1.0112 1.0118
"""
CE_OF_QUICKSTART = [5.0955, 5.0038, 4.9094, 4.8726, 4.7928, 4.7705, 4.7571, 4.7341, 4.7325]
KL_OF_QUICKSTART = [1.1816, 1.1300, 1.0512, 1.0146, 0.9664, 0.9397, 0.9287, 0.9171, 0.9173]
DRAWN_BY_QUICKSTART = [0, 220, 443, 666, 887, 1098, 1303, 1501, 1702]


def test_a_measured_overtraining_is_seen_before_it_costs_much() -> None:
    curve, kls = ([float(value) for value in one.split()] for one in (CE_OF_20_BLOCKS, KL_OF_20_BLOCKS))
    history = [
        Measurement(step=5 * t, ce=ce, kl=kl, blocks_drawn=20 * t, all_drawn=40 * t, train_blocks=20)
        for t, (ce, kl) in enumerate(zip(curve, kls, strict=True))
    ]
    assert kinds(history, 4.0) == {"epochs": 25, "ce_rises": 50, "kl_off_line": 90}
    best, at_alarm, worst = min(curve), curve[50 // 5], max(curve[50 // 5 :])
    assert at_alarm - best < 0.25 * (worst - best)


def test_the_measured_quickstart_raises_none() -> None:
    columns = zip(CE_OF_QUICKSTART, KL_OF_QUICKSTART, DRAWN_BY_QUICKSTART, strict=True)
    history = [
        Measurement(step=30 * t, ce=ce, kl=kl, blocks_drawn=drawn, all_drawn=480 * t, train_blocks=512)
        for t, (ce, kl, drawn) in enumerate(columns)
    ]
    assert 3.0 < (history[-1].epochs or 0.0) < 4.0
    assert kinds(history, 4.0) == {}


# The cap


def test_the_example_of_a_cap() -> None:
    capped = capped_mixture(Mixture(probabilities={"a": 0.6, "b": 0.3, "c": 0.1}), {"a": 0.2})
    assert capped.probabilities == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6),
    caps=st.dictionaries(st.integers(0, 5), st.floats(0.0, 0.5), max_size=6),
)
def test_a_cap_bounds_and_keeps_proportions(weights: list[float], caps: dict[int, float]) -> None:
    mixture = Mixture(probabilities={str(i): w / math.fsum(weights) for i, w in enumerate(weights)})
    most = {str(i): cap for i, cap in caps.items() if i < len(weights)}
    capped = capped_mixture(mixture, most)
    free = [domain for domain in mixture.domains if domain not in most]
    if not free:
        assert capped == mixture
        return
    assert capped.domains == mixture.domains
    assert all(capped.probabilities[domain] <= cap for domain, cap in most.items())
    for one in free:
        assert capped.probabilities[one] * mixture.probabilities[free[0]] == pytest.approx(
            capped.probabilities[free[0]] * mixture.probabilities[one]
        )
    assert capped_mixture(capped, most).probabilities == pytest.approx(dict(capped.probabilities))


def test_the_floor_is_what_the_rule_never_goes_below() -> None:
    sizes = {"m/a": 30, "m/b": 10, "w": 100}
    assert smallest_mixture("ddk", MixtureConfig(alpha=0.4), sizes) == pytest.approx(dict.fromkeys(sizes, 0.2))
    assert smallest_mixture("ddk_retain", MixtureConfig(retain_alpha=0.7), sizes) == pytest.approx(
        dict.fromkeys(sizes, 0.1)
    )
    # Of two domains 0.3 each, and within 'm' by size.
    assert smallest_mixture("ddk", MixtureConfig(alpha=0.4, level=1), sizes) == pytest.approx(
        {"m/a": 0.225, "m/b": 0.075, "w": 0.3}
    )


# A student that overtrains

TOKENS, LENGTH, KEPT = 32, 31, 8


class NoisyTeacher:
    """Knows the chain that texts are drawn from, but for an error of its own in every logit."""

    k, vocab_size = KEPT, TOKENS

    def __init__(self, tokens: np.ndarray, chain_VV: np.ndarray) -> None:
        logits_VV = np.log(chain_VV) + 0.5 * np.random.default_rng(9).standard_normal(chain_VV.shape)
        log_p_BLV = (logits_VV - np.log(np.exp(logits_VV).sum(1, keepdims=True)))[tokens[:, :-1]]
        self.ids = np.argsort(-log_p_BLV, -1, kind="stable")[..., :KEPT].astype(np.int32)
        self.kept = np.take_along_axis(log_p_BLV, self.ids, -1).astype(np.float32)
        self.true = np.take_along_axis(log_p_BLV, tokens[:, 1:, None], -1)[..., 0].astype(np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices) -> SparseTargets:
        rows = np.asarray(indices)
        return SparseTargets(
            ids_BLK=self.ids[rows],
            logprobs_BLK=self.kept[rows],
            tail_mass_BL=(1 - np.exp(self.kept[rows]).sum(-1)).clip(0, 1).astype(np.float32),
            true_logprobs_BL=self.true[rows],
        )


def chain(seed: int) -> np.ndarray:
    p_VV = np.exp(1.5 * np.random.default_rng(seed).standard_normal((TOKENS, TOKENS)))
    return p_VV / p_VV.sum(1, keepdims=True)


def text(seed: int, chain_VV: np.ndarray, blocks: int) -> np.ndarray:
    random, tokens = np.random.default_rng(seed), np.zeros((blocks, LENGTH + 1), np.int32)
    tokens[:, 0] = random.integers(0, TOKENS, blocks)
    for place in range(LENGTH):
        drawn = random.random(blocks)[:, None] > chain_VV.cumsum(1)[tokens[:, place]]
        tokens[:, place + 1] = drawn.sum(1).clip(0, TOKENS - 1)
    return tokens


def overtraining() -> dict[str, list[Measurement]]:
    """20 blocks and 2,000 blocks, drawn equally often."""
    chains = {"small": chain(1), "large": chain(2)}
    train = {"small": text(3, chains["small"], 20), "large": text(4, chains["large"], 2000)}
    validation = {domain: text(5, of, 48) for domain, of in chains.items()}

    def readers(tokens: dict[str, np.ndarray]) -> TrainData:
        return TrainData(
            blocks={domain: Blocks(0, 0, one) for domain, one in tokens.items()},
            targets={domain: NoisyTeacher(one, chains[domain]) for domain, one in tokens.items()},
        )

    held_out = readers(validation)
    trainer = Trainer(
        tiny_model(hidden=32),
        readers(train),
        config=TrainConfig(
            steps=210, batch_size=8, learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=5, device="cpu"
        ),
        loss=LossConfig(gamma=1.0),
        vocab_size=TOKENS,
        seed=0,
    )
    history: dict[str, list[Measurement]] = {domain: [] for domain in chains}
    while True:
        drawn = trainer.state.sampler.drawn
        for domain, measured in history.items():
            found = trainer.held_out(held_out.blocks[domain], (held_out.targets or {})[domain])
            measured.append(
                Measurement(
                    step=trainer.state.step,
                    ce=math.log(found.ppl),
                    kl=found.kl,
                    blocks_drawn=drawn[domain],
                    all_drawn=sum(drawn.values()),
                    train_blocks=len(train[domain]),
                )
            )
        if trainer.done:
            return history
        trainer.train_interval(Mixture(probabilities=dict.fromkeys(chains, 0.5)), len(history["small"]) - 1, 15)


def test_of_a_run_that_overtrains_the_alarm_comes_before_the_worst_point() -> None:
    history = overtraining()
    small = history["small"]
    best = min(small, key=lambda one: one.ce)
    worst = max(small[small.index(best) :], key=lambda one: one.ce)
    assert worst.ce > best.ce + 0.15, "it does overtrain"
    raised: dict[str, Alarm] = {alarm.kind: alarm for alarm in alarms(history, 4.0)}
    assert {alarm.domain for alarm in raised.values()} == {"small"}
    assert raised["epochs"].step <= best.step, "the first sign comes before anything is lost"
    assert best.step < raised["kl_off_line"].step < worst.step
