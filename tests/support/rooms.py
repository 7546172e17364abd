"""The rooms of the house: every package with its modules, and the imports between packages.

`python tests/support/rooms.py` writes the table of docs/architecture.md and its picture anew; tests/test_rooms.py keeps
both true.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from picture import draw
from repository import REPOSITORY

PAGE = REPOSITORY / "docs" / "architecture.md"
PICTURE = REPOSITORY / "docs" / "images" / "architecture.svg"
TABLE = re.compile(r"(?<=<!-- rooms -->\n).*?(?=\n<!-- /rooms -->)", re.DOTALL)
PACKAGES = ("ddk", "storage", "tasks", "flows")
HOLDS = {
    "ddk": "the method itself; start with `mixture.py` (Equations 1 and 2), `loss.py` and `sampler.py`",
    "ddk.cost": "operations and memory of a model, calculated from its shape",
    "ddk.laws": "scaling laws: what they are fitted to, their forms, how good they are, what they answer",
    "ddk.methods": "DDK and the methods it is compared with: how each one mixes the domains",
    "ddk.ted": "task-aware layer-wise distillation (TED): filters and the student that uses them",
    "storage": "the entry points `targets.py`, `blocks.py`, `selections.py`, which open a store; errors, fingerprints",
    "storage.checking": "`ddk verify`: checks every byte of stores and runs",
    "storage.cleaning": "`ddk clean`: what of a root nothing needs, and how it is removed",
    "storage.corpus": "the documents of a domain: files, records, leaves",
    "storage.exchange": "reads and writes caches in formats of other projects",
    "storage.files": "files at a URL (disk, S3), and the checks of small files",
    "storage.reading": "reads blocks from shards: on disk, from copies, by ranges",
    "storage.runs": "a run's folder: checkpoints, mixture history, evaluations; comparisons and laws",
    "storage.stores": "a store's layout, codec and manifest; what counts as written",
    "tasks.capture": "writes targets into stores: captured or imported; captures samples again to compare",
    "tasks.comparing": "comparisons of several runs: data, page, plots",
    "tasks.diagnosis": "`ddk doctor`: checks of the machine, of numerics on it, of storage and the hub",
    "tasks.evaluation": "benchmarks: questions, models that answer, the sandbox for programs",
    "tasks.packing": "turns documents into token blocks",
    "tasks.planning": "derives the stores of a configuration, and checks that its models fit together",
    "tasks.predicting": "a law of several runs: its points, its file, page and plots",
    "tasks.reporting": "a run's report, model card and artifacts",
    "tasks.running": "helpers of every task: retries, errors, claims, child processes, Prefect's server",
    "tasks.selecting": "which train blocks to use: scores, and the choice among them",
    "tasks.showing": "progress, the log, Prefect's artifacts and events",
    "tasks.teachers": "the teacher: vLLM's engine, prompt log-probabilities, a server",
    "tasks.training": "the student's training: the run, its intervals, one process or many",
    "tasks.training.tracking": "a run's metrics in TensorBoard, Weights & Biases, MLflow",
    "flows": "the flows, the configuration, the entry point of `ddk`",
    "flows.commands": "the `ddk` commands",
    "flows.comparing": "`ddk compare`: variants, and the flow that runs them",
    "flows.costing": "`ddk plan --cost`: disk, memory and GPU hours ahead of a run",
    "flows.operating": "deployments, `ddk serve`, automations, Prefect's server and its database",
    "flows.pages": "pages of the documentation that are made from the code",
    "flows.presets.quickstart": "the quickstart's models and corpora, and the script that made them",
    "flows.predicting": "`ddk law`: fits, answers, the runs that determine a law; `ddk plan --predict`",
    "flows.stores": "`ddk plan`, `inspect`, `verify`, `import`, `export`",
}


@dataclass(frozen=True, slots=True)
class Room:
    """A package: its modules, and the other packages that they import, with the number of importing statements."""

    name: str
    modules: int
    uses: dict[str, int]


def rooms() -> list[Room]:
    """All of them, by package and name."""
    modules = {_dotted(path): path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))}
    modules = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    found: dict[str, dict[str, int]] = {}
    for name, path in modules.items():
        uses = found.setdefault(_room(name), {})
        for module in _imported(path, modules):
            if _room(module) != _room(name):
                uses[_room(module)] = uses.get(_room(module), 0) + 1
    sizes = {room: sum(_room(name) == room for name in modules) for room in found}
    order = sorted(found, key=lambda room: (PACKAGES.index(room.split(".")[0]), room))
    return [Room(room, sizes[room], dict(sorted(found[room].items()))) for room in order]


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def _room(module: str) -> str:
    return module.rpartition(".")[0]


def _imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            named = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named = {alias.name for alias in node.names}
        else:
            continue
        yield from sorted(named & modules.keys())


def table() -> str:
    """Markdown: each room, what it holds, its number of modules, and its imports from rooms of the same package."""
    lines = ["| room | holds | modules | uses, of its package (imports) |", "|---|---|---|---|"]
    for room in rooms():
        own = {name: count for name, count in room.uses.items() if name.split(".")[0] == room.name.split(".")[0]}
        uses = ", ".join(f"{name.partition('.')[2] or name} {count}" for name, count in own.items())
        lines.append(f"| `{room.name.replace('.', '/')}/` | {HOLDS[room.name]} | {room.modules} | {uses} |")
    return "\n".join(lines)


def picture() -> str:
    """SVG: the data, the loop, and the packages with their rooms."""
    return draw(
        {
            package: [room.removeprefix(f"{package}.") for room in HOLDS if room.startswith(f"{package}.")]
            for package in reversed(PACKAGES)
        }
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
