"""Writes the table of docs/recipes.md, what each preset will take: `python -m flows.pages.recipes` (`make recipes`).

The figures are those of `ddk plan PRESET --cost`, so that the page cannot disagree with the command; a test keeps it up
to date.
"""

from __future__ import annotations

from pathlib import Path

from flows.config import Config, load_config
from flows.costing.estimate import Cost, Section, estimate
from flows.costing.run_size import Assumptions
from flows.costing.table import shown

PRESETS = ("qwen1.5-14b-1.8b", "llama2-13b-tinyllama", "starcoder-15.5b-3b", "qwen2.5-14b-1.5b")
PAGE = str(Path(__file__).resolve().parents[2] / "docs" / "recipes.md")
BEGIN, END = "<!-- begin: make recipes -->", "<!-- end -->"
_ROWS: tuple[tuple[str, Section, str], ...] = (
    ("positions trained", "positions", "training"),
    ("positions captured", "positions", "captured"),
    ("targets, expected", "disk", "targets, expected"),
    ("targets, at most", "disk", "targets, at most"),
    ("disk in all, expected", "disk", "total, expected"),
    ("capture, memory of each GPU", "teacher, one GPU", "total"),
    ("training, memory of each GPU", "student, one GPU", "total"),
    ("host, as training starts", "host", "memory as training starts"),
    ("host, shared memory in capture", "host", "shared memory in capture"),
)
_HOURS = (("capture", "capture"), ("training", "training"), ("gap", "gap"), ("all", "all"))


def preset_path(name: str) -> str:
    return str(Path(__file__).resolve().parents[1] / "presets" / f"{name}.yaml")


def render() -> str:
    """The table in Markdown: a column a preset."""
    configs = [load_config(preset_path(name)) for name in PRESETS]
    by_gpu = {gpu: [estimate(config, Assumptions(gpu=gpu)) for config in configs] for gpu in ("a100", "h100")}
    rows = [
        ["", *(f"[`{name}`](../flows/presets/{name}.yaml)" for name in PRESETS)],
        ["---", *("---:" for _ in PRESETS)],
        ["teacher", *(_model(config.teacher.model) for config in configs)],
        ["student", *(_model(config.student.model) for config in configs)],
        ["GPUs of capture, of training", *(_gpus(config) for config in configs)],
    ]
    rows += [[title, *(_cell(cost, section, what) for cost in by_gpu["a100"])] for title, section, what in _ROWS]
    for gpu, costs in by_gpu.items():
        rows += [
            [f"{gpu.upper()}: {title}", *(_cell(one, "GPU time", what) for one in costs)] for title, what in _HOURS
        ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _model(name: str) -> str:
    return name.rpartition("/")[2]


def _gpus(config: Config) -> str:
    return f"{config.teacher.tensor_parallel_size}, {config.train.processes}"


def _cell(cost: Cost, section: Section, what: str) -> str:
    return shown(next(figure for figure in cost.figures if (figure.section, figure.what) == (section, what)))


def page(text: str) -> str:
    """The page with its table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{render()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    with open(PAGE, encoding="utf-8") as file:
        text = file.read()
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(page(text))
