"""The settings of bench_mixtures.py: corpora, teacher and student, and the targets that are captured once for all runs.

    five    the quickstart's five domains, teacher and student
    three   three of them, on which the student lags about equally
    eight   eight other domains, from a folder of corpora, with a teacher and a student trained on them from the
            quickstart's: the teacher on all alike, the student on another skew

All have blocks of 256 positions and batches of 16; validation is on 32 blocks a domain.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from flows.config import Config, load_config
from flows.presets.quickstart import remake

CHECKOUT = Path(__file__).resolve().parents[1]
PRESET = CHECKOUT / "flows" / "presets" / "quickstart.yaml"
SETTINGS = ("five", "three", "eight")
LEVEL = ("math", "code", "zh_books")
SKEW = {
    "arxiv": 0.03,
    "wiki": 0.30,
    "qa": 0.25,
    "dialogue": 0.02,
    "web": 0.25,
    "zh_web": 0.01,
    "code_java": 0.02,
    "code_bash": 0.12,
}
"""What the student of 'eight' was pre-trained on."""
TEACHER_STEPS, STUDENT_STEPS = 220, 150
LIMITS = {"max_train_blocks": 2048, "max_validation_blocks": 32}


def configuration(setting: str, root: Path) -> Config:
    """Of a run of this setting, with the quickstart's settings for all that is not its own."""
    folder = root / ("eight" if setting == "eight" else "quickstart")
    config = load_config(str(PRESET), (), str(folder)).model_dump(mode="json")
    domains = {name: {**domain, **LIMITS} for name, domain in config["domains"].items()}
    if setting == "three":
        domains = {name: domains[name] for name in LEVEL}
    if setting == "eight":
        assets = folder / "assets"
        paths = {name: assets / "corpora" / name for name in SKEW}
        domains = {
            name: {**LIMITS, "train": str(path / "train.jsonl"), "validation": str(path / "validation.jsonl")}
            for name, path in paths.items()
        }
        config["teacher"]["model"], config["student"]["model"] = str(assets / "teacher"), str(assets / "student")
    return Config.model_validate({**config, "domains": domains})


def prepare(setting: str, root: Path, corpora: Path | None) -> None:
    """Make what the setting's runs read: its models, its blocks, and the teacher's targets.

    Args:
        corpora: holds `<domain>/train.jsonl` and `validation.jsonl` of the eight domains; for 'eight' alone.
    """
    if setting == "eight":
        if corpora is None:
            raise SystemExit("the setting 'eight' reads a folder of corpora; name it with --corpora")
        make_models(corpora, root / "eight" / "assets")
    config = configuration(setting, root)
    path, done = root / f"{setting}.yaml", root / f"{setting}.done"
    wanted = yaml.safe_dump(config.model_dump(mode="json"))
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(wanted, encoding="utf-8")
    for stage in ("pack", "cache"):
        subprocess.run([sys.executable, "-m", "flows", stage, str(path), "--root", config.root], check=True)
    done.write_text(wanted, encoding="utf-8")


def make_models(corpora: Path, assets: Path) -> None:
    """Teacher and student of 'eight'; left as they are where they are there."""
    if all(any((assets / name).glob("*.safetensors")) for name in ("teacher", "student")):
        return
    tokenizer = AutoTokenizer.from_pretrained(str(remake.HERE / "teacher"), local_files_only=True)
    tokens: dict[str, dict[str, remake.Tokens]] = {"train": {}, "validation": {}}
    for domain in SKEW:
        for split, budget in (("train", remake.TRAIN_BYTES), ("validation", remake.VALIDATION_BYTES)):
            lines, _ = remake.head_of(corpora / domain / f"{split}.jsonl", budget)
            path = assets / "corpora" / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
            tokens[split][domain] = encoded(tokenizer, lines)
    alike = dict.fromkeys(SKEW, 1 / len(SKEW))
    for recipe in (
        replace(remake.STUDENT, mixture=SKEW, steps=STUDENT_STEPS, learning_rate=3e-3),
        replace(remake.TEACHER, mixture=alike, steps=TEACHER_STEPS, learning_rate=1e-3),
    ):
        make_model(recipe, tokens, assets / recipe.name)


def encoded(tokenizer: transformers.PreTrainedTokenizerBase, lines: list[str]) -> remake.Tokens:
    """The documents as one row of tokens, an EOS after each."""
    parts = tokenizer.backend_tokenizer.encode_batch([json.loads(line)["text"] for line in lines])
    return np.concatenate([np.asarray([*one.ids, tokenizer.eos_token_id], dtype=np.int64) for one in parts])


def make_model(
    recipe: remake.Recipe, tokens: Mapping[str, Mapping[str, remake.Tokens]], folder: Path, *, fresh: bool = False
) -> None:
    """Train on from the quickstart's model of the same name, or one from nothing; in float32 (bfloat16 is slow on many
    CPUs)."""
    transformers.set_seed(0)
    if fresh:
        model = Qwen2ForCausalLM(recipe.config())
    else:
        model = AutoModelForCausalLM.from_pretrained(
            str(remake.HERE / recipe.name), dtype=torch.float32, local_files_only=True
        )
    rng, device = np.random.default_rng(0), torch.device("cpu")
    remake.fit(model, recipe, tokens["train"], tokens["validation"], rng=rng, device=device, exact=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(remake.HERE / "teacher" / name, folder / name)
    remake.save_model(model, folder)
