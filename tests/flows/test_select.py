"""`ddk select` as a user calls it, on stores that are there; and training on what was selected."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_run import ASSETS, Ddk, SmallRun, files_below, small_config
from transformers import AutoModelForCausalLM

from flows.config import load_config
from flows.stages import plan_of, repeats
from storage.blocks import open_blocks
from storage.runs.folder import RunFolder
from storage.selections import open_scores, open_selection
from storage.stores.manifest import StoreWriter, read_manifest
from storage.targets import open_targets
from tasks.planning.selection_plan import plan_selections

pytestmark = pytest.mark.engine
BY_DIFFERENCE = {"by": "difference", "keep": 0.25}


def write(folder: Path, root: Path, name: str = "select.yaml", run: str = "selected", **select: Any) -> str:
    content = small_config(run=run, root=str(root))
    for domain, value in select.items():
        content["domains"][domain]["select"] = value
    path = folder / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@dataclass(frozen=True)
class Selected:
    config: str
    root: Path
    said: str

    def url(self, domain: str, kind: str) -> str:
        config = load_config(self.config)
        plan = plan_selections(config.root, plan_of(config), config.student)[domain]
        return plan.selection_url if kind == "selections" else plan.scores_url


@pytest.fixture(scope="module")
def selected(small_run: SmallRun, ddk: Ddk, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """On a copy of the small run's root: its stores, and its run with three checkpoints."""
    folder = tmp_path_factory.mktemp("select")
    shutil.copytree(small_run.root, folder / "root")
    config = write(
        folder,
        folder / "root",
        math=BY_DIFFERENCE,
        code={"by": "trajectory", "keep": 0.5, "run": "small", "clusters": 4},
    )
    done = ddk("select", config)
    assert done.code == 0, done.err
    return Selected(config, folder / "root", done.out)


def test_the_score_is_the_students_loss_less_the_teachers(selected: Selected) -> None:
    config = load_config(selected.config)
    store = plan_of(config)["math"]
    blocks, targets = open_blocks(store.blocks_url), open_targets(store.targets_url)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32).eval()
    losses = []
    for index in range(len(blocks)):
        tokens = torch.from_numpy(blocks.read([index]).astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits[0, :, : blocks.vocab_size].double()
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    assert open_scores(selected.url("math", "scores")).read()[:, 0] == pytest.approx(losses, abs=2e-4)
    expected = np.array(losses) + targets.true_logprobs().astype(np.float64).mean(axis=1)
    indices, scores = open_selection(selected.url("math", "selections")).read()
    assert len(indices) == 10 == round(0.25 * len(blocks))
    assert scores == pytest.approx(expected[indices], abs=3e-4)
    assert expected[indices].min() >= np.sort(expected)[-10] - 5e-4
    assert f"math: 10 of {len(blocks)} blocks kept" in selected.said


def test_trajectories_are_the_losses_at_the_runs_checkpoints(selected: Selected) -> None:
    losses = open_scores(selected.url("code", "scores")).read()
    assert losses.shape == (40, 3), "checkpoints at steps 2, 4 and 6"
    assert losses[:, 0].mean() > losses[:, 1].mean() > losses[:, 2].mean(), "it has learnt"
    indices, _ = open_selection(selected.url("code", "selections")).read()
    assert len(indices) == 20


def test_the_same_call_chooses_nothing_again_and_another_share_asks_no_model_again(
    selected: Selected, ddk: Ddk, tmp_path: Path
) -> None:
    before = files_below(selected.root / "selections")
    assert ddk("select", selected.config).code == 0
    assert files_below(selected.root / "selections") == before
    scores = files_below(selected.root / "scores")
    other = write(tmp_path, selected.root, math={"by": "difference", "keep": 0.5})
    done = ddk("select", other)
    assert "math: 20 of 40 blocks kept" in done.out
    assert files_below(selected.root / "scores") == scores


def test_killed_scoring_goes_on_at_the_first_missing_shard(
    selected: Selected, monkeypatch: pytest.MonkeyPatch, ddk: Ddk, tmp_path: Path
) -> None:
    """As a kill leaves it: a shard is committed, the store is not complete."""
    monkeypatch.setattr("tasks.planning.selection_plan.SHARD_BLOCKS", 16)
    root = tmp_path / "root"
    shutil.copytree(selected.root, root)
    shutil.rmtree(root / "selections")
    shutil.rmtree(root / "scores")
    config = load_config(write(tmp_path, root, math=BY_DIFFERENCE))
    plan = plan_selections(config.root, plan_of(config), config.student)["math"]
    writer = StoreWriter(plan.scores_url, "scores", plan.scores_inputs, plan.scores_dims)
    whole = open_scores(selected.url("math", "scores")).read()
    writer.write_shard("train", 0, {"losses": np.full((16, 1), 9.0, dtype=np.float32)})
    assert "select  math" in ddk("plan", write(tmp_path, root, math=BY_DIFFERENCE)).out
    assert ddk("select", write(tmp_path, root, math=BY_DIFFERENCE)).code == 0
    found = open_scores(plan.scores_url).read()
    assert (found[:16] == 9.0).all(), "what was committed is not scored again"
    assert found[16:] == pytest.approx(whole[16:], abs=1e-5)


def test_a_run_trains_on_the_kept_blocks_alone(selected: Selected, ddk: Ddk) -> None:
    done = ddk("train", selected.config)
    assert done.code == 0, done.err
    folder = RunFolder(str(selected.root), "selected")
    identity, summary = folder.identity(), folder.summary()
    assert identity is not None
    assert summary is not None
    assert identity["stores"]["math"]["selections"] == selected.url("math", "selections").split("/")[-2]
    assert "selections" not in identity["stores"]["zh_books"]
    page = (selected.root / "runs" / "selected" / "report" / "index.html").read_text(encoding="utf-8")
    assert "10 of 40 blocks" in page
    plan = ddk("plan", selected.config)
    assert "select  code" in plan.out
    assert "nothing to do" in plan.out
    assert ddk("verify", str(selected.root)).code == 0


def test_without_its_selection_no_run_begins(selected: Selected, ddk: Ddk, tmp_path: Path) -> None:
    said = ddk.refusal("train", write(tmp_path, selected.root, run="early", math={"by": "difference", "keep": 0.3}))
    assert "run `ddk select` first" in said


def test_a_store_of_scores_is_shown_and_damage_is_found(selected: Selected, ddk: Ddk, tmp_path: Path) -> None:
    shown = ddk("inspect", selected.url("math", "selections"))
    assert shown.code == 0, shown.err
    assert "selections" in shown.out
    assert "train: 10 blocks" in shown.out
    root = tmp_path / "root"
    shutil.copytree(selected.root, root)
    (shard,) = Path(selected.url("math", "selections").replace(str(selected.root), str(root))).glob("train/indices/c/*")
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(bytes(content))
    found = ddk("verify", str(root))
    assert found.code == 1
    assert "indices" in found.out


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"by": "difference", "keep": 0}, "keep"),
        ({"by": "luck"}, "select"),
        ({"by": "trajectory", "run": "never"}, "is 'never', which is not a finished run"),
        ({"by": "difference", "reference": "./nowhere"}, "there is no such folder"),
        ({"by": "trajectory", "run": "../x"}, "run"),
    ],
)
def test_a_wrong_selection_is_refused(selected: Selected, ddk: Ddk, tmp_path: Path, select: Any, said: str) -> None:
    assert said in ddk.refusal("select", write(tmp_path, selected.root, math=select))


def test_few_kept_blocks_are_said_to_repeat(selected: Selected) -> None:
    config = load_config(selected.config)
    assert repeats(config, {"math": 10, "code": 20}, 3) == {"math": pytest.approx(6 * 8 / 3 / 10)}


def test_the_manifest_says_how_scores_lie(selected: Selected) -> None:
    manifest = read_manifest(selected.url("math", "selections"))
    assert manifest is not None
    facts = manifest.facts
    assert sum(facts["all"]) == 40 == facts["blocks"]
    assert sum(facts["kept"]) == 10
    assert len(facts["edges"]) == len(facts["all"]) + 1
