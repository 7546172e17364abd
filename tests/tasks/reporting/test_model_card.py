from __future__ import annotations

import re

import pytest
import yaml

from tasks.reporting.model_card import is_hub_id, render_model_card
from tasks.showing.formats import escape


def front_matter(card):
    start, matter, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter), body


def test_front_matter_is_what_the_hub_reads(summary, records):
    matter, _ = front_matter(render_model_card(summary, records))
    assert matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-1.5B",
        "tags": ["distillation", "ddk"],
    }


def test_the_hub_library_accepts_it(summary, records):
    from huggingface_hub import ModelCard

    card = ModelCard(render_model_card(summary, records))
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B"
    assert card.data.library_name == "transformers"
    assert card.text.lstrip().startswith("# try_1")


def test_a_local_student_is_no_base_model(make_summary, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "student").mkdir(parents=True)
    matter, body = front_matter(render_model_card(make_summary(student="models/student"), records))
    assert "base_model" not in matter
    assert "models/student" in body


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen2.5-1.5B", True),
        ("gpt2", False),
        ("/models/student", False),
        ("./student", False),
        ("~/student", False),
        ("s3://bucket/student", False),
        ("a/b/c", False),
        ("a/b\n", False),
    ],
)
def test_is_hub_id(name, is_one):
    assert is_hub_id(name) is is_one


def test_results_and_data(summary, records):
    card = render_model_card(summary, records)
    assert "| code | 8.00 | 32.00 | 12.00 | 4.000 | 1.500 |" in card
    assert "| math | 8 | 2,048 | 22.2\xa0% |" in card
    assert "9,216 tokens in 20 optimizer steps" in card
    assert "Qwen/Qwen2.5-14B" in card
    assert "arXiv 2407.16154" in card
    assert "on the validation blocks of the domains listed above" in card


def test_recipe_is_taken_from_the_settings(summary, records):
    card = render_model_card(summary, records)
    for line in (
        "| method | ddk |",
        "| weight of the divergence (γ) | 0.2 |",
        "| temperature | 1.0 |",
        "| treatment of the tail | bucket |",
        "| smoothing of the mixture (α) | 0.5 |",
        "| steps in an interval | 10 |",
        "| learning rate | 3e-05 |",
        "| planned steps | 20 |",
        "| blocks in a batch | 4 |",
    ):
        assert line in card


def test_two_settings_of_one_name_are_told_apart(make_summary, records):
    card = render_model_card(make_summary(settings={"train": {"seed": 1}, "corpus": {"seed": 2}}), records)
    assert "| seed (train.seed) | 1 |" in card
    assert "| seed (corpus.seed) | 2 |" in card


def test_a_gamma_that_is_not_the_same_everywhere_is_said(make_summary, records):
    loss = {"gamma": 0.2, "gamma_of": {"gamma": 0.5, "math/algebra": 1.0}, "gamma_until": 15, "min_entropy": 0.0}
    card = render_model_card(make_summary(settings={"loss": loss}), records)
    for line in (
        "| weight of the divergence (γ) | 0.2 |",
        "| γ of domain gamma | 0.5 |",
        "| γ of domain math/algebra | 1.0 |",
        "| steps with the divergence | 15 |",
    ):
        assert line in card
    assert "entropy" not in card
    assert "γ" not in render_model_card(make_summary(method="cpt", settings={"loss": loss}), records)


def test_what_retains_is_said_of_ddk_retain_alone(make_summary, records):
    settings = {
        "mixture": {
            "alpha": 0.5,
            "retain_alpha": 0.8,
            "retain_temperature": 0.25,
            "retain_weight": 4.0,
            "retain_tolerance": 0.1,
        }
    }
    card = render_model_card(make_summary(method="ddk_retain", settings=settings), records)
    assert "| weight of what was lost in the mixture (κ) | 4.0 |" in card
    assert "| loss that has the whole weight (f₀, nats) | 0.1 |" in card
    assert "| share of the mixture that follows the gap (α) | 0.8 |" in card
    assert "smoothing of the mixture" not in card
    assert "κ" not in render_model_card(make_summary(method="ddk", settings=settings), records)


def test_what_the_method_does_not_use_is_not_claimed(make_summary, records):
    card = render_model_card(make_summary(method="cpt"), records)
    assert "trained without targets, compared with Qwen/Qwen2.5-14B" in card
    assert "γ" not in card
    assert "temperature" not in card
    assert "α" not in card
    assert front_matter(card)[0]["tags"] == ["ddk"]
    kd = render_model_card(make_summary(method="kd"), records)
    assert "γ" in kd
    assert "α" not in kd


def test_without_settings_there_is_no_number_that_was_not_given(make_summary, records):
    card = render_model_card(make_summary(settings={}), records)
    given = {
        "0.2", "2407.16154", "2.5", "14", "1.5", "1", "9,216", "20", "256", "8", "12", "16", "2,048", "3,072", "4,096",
        "22.2", "33.3", "44.4", "8.00", "32.00", "12.00", "4.000", "1.500", "24.00", "16.00", "3.000", "2.000", "1.000",
    }  # fmt: skip
    assert set(re.findall(r"\d+(?:[.,]\d+)*", card)) <= given


def test_stopped_early_is_said(make_summary, records):
    assert "used up: every ratio is below 1.05" in render_model_card(
        make_summary(stopped_early="every ratio is below 1.05"), records
    )


def test_hostile_names_neither_break_the_tables_nor_the_front_matter(make_summary, make_records):
    name = "<b>|x|\n---\n[a](http://evil)"
    card = render_model_card(make_summary(name=name), make_records({name: [2.0, 1.5], "zh_books": [1.5, 1.2]}))
    matter, body = front_matter(card)
    assert matter["tags"] == ["distillation", "ddk"]
    assert "<b>" not in body
    assert "| zh_books |" in body
    for row in [line for line in body.splitlines() if line.startswith("| &lt;b")]:
        assert len(re.findall(r"(?<!\\)\|", row)) in (5, 7)


def test_escape():
    assert escape("zh_books") == "zh_books"
    assert escape("_a_ *b* `c`") == r"\_a\_ \*b\* \`c\`"


def test_a_student_for_longer_contexts_says_so(make_summary, summary, records):
    context = {"target": 2048, "trained": 256, "block": 256, "max_scale": 20, "offset_after": 4}
    context |= {"distil": False, "saved_share": 0.5}
    card = render_model_card(make_summary(context=context), records)
    assert "For 2,048 positions, trained on blocks of 256" in card
    assert "declares 2,048 positions and divides them by 8 (linear scaling" in card
    assert "cross-entropy alone" in card
    assert "measured at positions as they are" in card
    assert "by 8 in 50% of the blocks and by a random number up to 20 in the others" in card
    assert "## Context" not in render_model_card(summary, records)
    longer = render_model_card(
        make_summary(context={**context, "trained": 128, "distil": True, "saved_share": 0}), records
    )
    assert "targets are of ordinary positions" in longer
    assert "divided by a random number up to 20, and" in longer
    assert "measured at positions divided by 2" in longer
