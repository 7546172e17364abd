"""`ddk law` as a user calls it: design runs on a cache that is there, then ask the law that was fitted to them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from law_runs import add_domain, resized
from small_run import ASSETS, DOMAINS, Ddk, Finished, SmallRun, write_config

from flows.config import load_config
from flows.predicting.mixtures import given_mixture, mixture_after_tokens
from flows.predicting.teachers import refused, teachers_request
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from tasks.predicting.record import LawRecord, read_law

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

STEPS, TOKENS = 6, 6 * 8 * 96
RUN = "law-ddk_equal-equal-s0"


@dataclass(frozen=True)
class Designed:
    config: str
    root: Path
    output: Finished

    @property
    def law(self) -> LawRecord:
        return read_law(str(self.root), "law")

    @property
    def folder(self) -> Path:
        return self.root / "laws" / "law"


@pytest.fixture(scope="module")
def designed(small_run: SmallRun, ddk: Ddk, tmp_path_factory: pytest.TempPathFactory) -> Designed:
    """On the stores of the small run, so that no engine is started."""
    folder = tmp_path_factory.mktemp("law")
    for part in ("blocks", "targets"):
        shutil.copytree(small_run.root / part, folder / "root" / part)
    config = write_config(folder, train={"steps": STEPS, "warmup_steps": 1, "keep_checkpoints": 1})
    return Designed(config, folder / "root", ddk("law", config, "--design"))


def test_the_designed_runs_give_every_domain_different_shares(designed: Designed) -> None:
    assert designed.output.code == 0, designed.output.err
    assert f"6 runs, {6 * TOKENS:,} positions" in designed.output.out
    runs = sorted(path.name for path in (designed.root / "runs").iterdir())
    assert runs == sorted(["law-ddk_equal-equal-s0", *(f"law-ddk_equal-m{n}-s0" for n in range(1, 6))])
    for domain in DOMAINS:
        shares = {
            round(run.config()["mixture"]["weights"][domain], 4)  # type: ignore[index]
            for run in (RunFolder(str(designed.root), name) for name in runs)
            if run.config()["mixture"]["weights"] != "equal"  # type: ignore[index]
        }
        assert shares == {0.25, 0.5, 1.0, 2.0, 4.0}


def test_the_law_holds_what_the_runs_measured(designed: Designed) -> None:
    law = designed.law
    assert set(law.domains) == set(DOMAINS)
    assert law.form == "dcpt"
    assert not law.sized
    for point in law.points:
        records = MixtureHistory(str(designed.root / "runs" / point.run)).records()
        (record,) = [one for one in records if one.tokens_seen == point.tokens]
        drawn = sum(record.blocks_drawn.values())
        for gap in record.gaps:
            assert point.losses[gap.domain] == pytest.approx(math.log(gap.student_ppl))
            assert point.shares[gap.domain] == pytest.approx(record.blocks_drawn.get(gap.domain, 0) / drawn)
    assert {len(one.resampled) for one in law.laws.values()} == {200}
    assert all(one.ratio is not None and one.length is not None and one.size is None for one in law.laws.values())
    assert "one student size" in designed.output.out
    page = (designed.folder / "index.html").read_text(encoding="utf-8")
    assert all(domain in page for domain in DOMAINS)
    assert "unseen mixture" in page


def test_the_same_call_runs_nothing_again(designed: Designed, ddk: Ddk) -> None:
    before = (designed.folder / "law.json").read_bytes()
    done = ddk("law", "fit", designed.config, "--runs", "law-*")
    assert done.code == 0, done.err
    assert (designed.folder / "law.json").read_bytes() == before


def asked(designed: Designed, ddk: Ddk, *words: str) -> Any:
    done = ddk("law", *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_best_mixture_is_shown_and_written(designed: Designed, ddk: Ddk, tmp_path: Path) -> None:
    written = tmp_path / "new.yaml"
    answer = asked(designed, ddk, "mixture", designed.config, "--objective", "worst", "--write", str(written))
    assert math.fsum(answer["mixture"].values()) == pytest.approx(1.0)
    assert answer["worst"] <= answer["equal"]["worst"] + 1e-6
    assert answer["worst_interval"][0] <= answer["worst"] * 1.05
    assert answer["tokens"] == TOKENS
    law = designed.law
    for domain, share in answer["mixture"].items():
        assert law.laws[domain].share[0] - 1e-6 <= share <= law.laws[domain].share[1] + 1e-6
        assert answer["epochs"][domain] == pytest.approx(share * TOKENS / (40 * 96), rel=1e-3)
    new = load_config(str(written))
    assert new.method == "ddk_equal"
    assert new.mixture.weights == pytest.approx(answer["mixture"], abs=1e-4)
    assert (designed.folder / "mixture-worst.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((designed.folder / "mixture-worst.json").read_text())["mixture"] == answer["mixture"]
    again = ddk.refusal("law", "mixture", designed.config, "--write", str(written))
    assert "there is such a file" in again
    assert yaml.safe_load(written.read_text())["mixture"]["weights"], "nothing was lost"


def test_limited_data_bound_the_mixture(designed: Designed, ddk: Ddk) -> None:
    answer = asked(designed, ddk, "mixture", designed.config, "--epochs", "0.6")
    assert max(answer["epochs"].values()) <= 0.6 + 1e-6
    said = ddk.refusal("law", "mixture", designed.config, "--epochs", "0.1")
    assert "allow more epochs" in said


def test_tokens_and_ratios_answer_each_other(designed: Designed, ddk: Ddk) -> None:
    at_end = asked(designed, ddk, "tokens", designed.config, "--mixture", "equal")
    assert at_end["tokens"] == TOKENS
    target = f"{at_end['worst'] * 1.01:.4f}"
    until = asked(designed, ddk, "tokens", designed.config, "--mixture", "equal", "--ratio", target)
    assert until["tokens"] < TOKENS
    assert until["worst"] <= float(target) * 1.001
    assert "never falls to 0.2" in ddk.refusal("law", "tokens", designed.config, "--ratio", "0.2")


def test_a_method_that_follows_the_gap_is_played_through(designed: Designed) -> None:
    config, law = load_config(designed.config), designed.law
    shares = mixture_after_tokens(config, law, law.sizes[0])(TOKENS)
    assert math.fsum(shares.values()) == pytest.approx(1.0)
    lagging = max(law.domains, key=lambda domain: math.exp(law.start(law.sizes[0])[domain] - law.teacher[domain]))
    assert shares[lagging] > 1 / 3, "ddk draws most where the ratio is largest"
    fixed = mixture_after_tokens(config.model_copy(update={"method": "ddk_equal"}), law, law.sizes[0])(TOKENS)
    assert fixed == pytest.approx(dict.fromkeys(law.domains, 1 / 3))
    assert given_mixture("math=2,code=1,zh_books=1", law)["math"] == 0.5


def test_plan_says_what_is_expected(designed: Designed, ddk: Ddk) -> None:
    done = ddk("plan", designed.config, "--predict")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("expected")]
    assert "by law 'law' (dcpt, 6 runs)" in line
    shares = mixture_after_tokens(load_config(designed.config), designed.law, designed.law.sizes[0])(TOKENS)
    predicted = designed.law.outcome(designed.law.sizes[0], TOKENS, shares)
    assert f"largest ratio {predicted.outcome.worst:.3f} (" in line
    other = ddk.refusal("plan", designed.config, "--predict", "--set", "packing.seq_len=64")
    assert "other stores" in other
    assert "there is no" in ddk.refusal("plan", designed.config, "--predict", "--law", "nope")


def test_what_a_law_cannot_say_is_refused(designed: Designed, ddk: Ddk) -> None:
    assert "knows one size" in ddk.refusal("law", "size", designed.config)
    assert "knows 'math'" in ddk.refusal("law", designed.config, "--new-domain", "math")
    assert "no run of" in ddk.refusal("law", designed.config, "--runs", "nope-*")
    assert "--form is 'cubic'" in ddk.refusal("law", designed.config, "--form", "cubic")
    assert "--name is '../x'" in ddk.refusal("law", designed.config, "--name", "../x")
    assert "one of the domains" in ddk.refusal("law", "mixture", designed.config, "--objective", "chess")
    assert "DOMAIN=WEIGHT" in ddk.refusal("law", "tokens", designed.config, "--mixture", "math=-1,code=1,zh_books=1")
    assert "two different models" in ddk.refusal("law", designed.config, "--teachers", "only-one")


def test_a_new_domain_is_predicted_by_a_law_of_enough_domains(designed: Designed, ddk: Ddk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(designed.root, root)
    add_domain(root, RUN, "with-books", "books", most=2)
    words = ("law", designed.config, "--root", str(root), "--new-domain", "books", "--run")
    assert "at least 4 domains" in ddk.refusal(*words, "with-books")
    assert "and not 'books'" in ddk.refusal(*words, RUN)

    for number, path in enumerate(sorted((designed.root / "runs").iterdir())):
        add_domain(
            root, path.name, f"four-{number}", "web", drawn=8 << number, ppl=lambda count: 70 + 80 / (1 + count / 100)
        )
    add_domain(root, "four-0", "five", "books", most=2)
    done = ddk("law", "fit", designed.config, "--root", str(root), "--runs", "four-*", "--name", "four")
    assert done.code == 0, done.err
    found = asked(designed, ddk, "new-domain", *words[1:-1], "--run", "five", "--name", "four")
    assert (found["start"], found["teacher"]) == pytest.approx((math.log(150), math.log(70)))
    losses = [place["loss"] for place in found["predicted"]]
    assert losses == sorted(losses, reverse=True), "the more of it, the lower its loss"
    assert math.log(70) < losses[-1] < math.log(150), "with all of the tokens, it is learnt"


def test_a_teacher_that_cannot_take_the_blocks_is_named_before_anything_is_captured(designed: Designed) -> None:
    config = load_config(designed.config, ["packing.seq_len=256"])
    models = [str(ASSETS / "teacher"), str(ASSETS / "student")]
    asked = teachers_request(config, ".", name="teachers", teachers=models, seeds=[0, 1], blocks=8, steps=5)
    reasons = refused(config, asked)
    assert list(reasons) == ["student"]
    assert "takes at most 255" in reasons["student"]


def test_one_run_alone_is_refused(designed: Designed, ddk: Ddk) -> None:
    said = ddk.refusal("law", designed.config, "--runs", "law-ddk_equal-m1-s0")
    assert "a law needs" in said
    assert "ddk law design" in said


@pytest.mark.parametrize(
    "change", [lambda text: text.replace('"dcpt"', '"power"'), lambda text: text[: len(text) // 2]]
)
def test_a_damaged_law_is_found(designed: Designed, ddk: Ddk, tmp_path: Path, change: Callable[[str], str]) -> None:
    root = tmp_path / "root"
    shutil.copytree(designed.root, root)
    sound = ddk("verify", str(root))
    assert sound.code == 0, sound.out
    place = root / "laws" / "law" / "law.json"
    place.write_text(change(place.read_text(encoding="utf-8")), encoding="utf-8")
    assert "law.json" in ddk.refusal("law", "tokens", designed.config, "--root", str(root))
    found = ddk("verify", str(root))
    assert found.code == 1
    assert str(place) in found.out


def test_several_sizes_weigh_size_against_tokens(designed: Designed, ddk: Ddk, tmp_path: Path) -> None:
    """With runs of a second and a third size, whose losses are the first's moved by a known term."""
    root, sizes = tmp_path / "root", (0.25, 4.0)
    shutil.copytree(designed.root, root)
    for factor in sizes:
        resized(root, "law-ddk_equal-*", factor, ASSETS / "student", tmp_path / f"student{factor:g}")
    done = ddk("law", designed.config, "--root", str(root), "--runs", "*")
    assert done.code == 0, done.err
    law = read_law(str(root), "law")
    assert law.sized
    assert len(law.sizes) == 3
    assert all(one.size is not None for one in law.laws.values())
    answer = asked(designed, ddk, "size", designed.config, "--root", str(root))
    assert answer["flops"] == pytest.approx(6 * law.sizes[1] * TOKENS)
    values = [one["value"] for one in answer["along"]]
    assert answer["value"] == min(values)
    assert np.std(values) > 0
    assert "do not lie on one law" not in done.out
