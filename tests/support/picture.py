"""The picture of docs/architecture.md: data and loop above, packages and their rooms below. `rooms.py` writes it.

Plain SVG, drawn on a grid of pixels; a test compares the file with what `draw` returns.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 980, 690
_INK, _QUIET, _LINE = "#1f2933", "#52606d", "#7b8794"
_STORED, _COMPUTED, _ROOM = "#e3f2fd", "#fff3d6", "#f5f7fa"


def draw(packages: Mapping[str, Sequence[str]]) -> str:
    """An SVG document.

    Args:
        packages: in the order of their imports, each with the names of its rooms.
    """
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(20, 34, "What is stored, and what runs", 18, bold=True),
        *_box(20, 60, 165, 84, "corpora", "JSON lines, Parquet, text; on disk or S3", _STORED),
        *_box(255, 60, 165, 84, "blocks", "tokens [N, L+1], a Zarr store a domain", _STORED),
        *_box(510, 60, 180, 84, "targets", "top-k ids and log-probabilities, tail mass", _STORED),
        *_box(780, 60, 180, 84, "student", "torch, sparse CE + γ·KL; checkpoints", _COMPUTED),
        *_box(780, 215, 180, 74, "gap of each domain", "student’s ÷ teacher’s perplexity", _COMPUTED),
        *_box(780, 345, 180, 74, "mixture", "append-only history of probabilities", _STORED),
        *_box(510, 345, 180, 74, "sampler", "a pure function of seed and mixture", _COMPUTED),
        *_arrow((185, 102), (255, 102), "pack"),
        *_arrow((420, 102), (510, 102), "capture", "(vLLM)"),
        *_arrow((690, 102), (780, 102), "train"),
        *_arrow((870, 144), (870, 215), "every K steps"),
        *_arrow((870, 289), (870, 345), "Equations 1, 2"),
        *_arrow((780, 382), (690, 382), "draws"),
        *_arrow((600, 345), (600, 144), "which blocks"),
        _text(20, 235, "Blue is stored: stages exchange nothing else,", 13, quiet=True),
        _text(20, 255, "so each can be run alone, killed and run again.", 13, quiet=True),
        _text(20, 285, "The teacher runs once; every later run reads its targets.", 13, quiet=True),
        _text(20, 466, "Packages: imports go from left to right, never back", 18, bold=True),
    ]
    width = (WIDTH - 40 - 3 * 40) / len(packages)
    for number, (name, rooms) in enumerate(packages.items()):
        x = 20 + number * (width + 40)
        parts += _box(x, 485, width, 180, f"{name}/", ", ".join(rooms), _ROOM)
        if number:
            parts += _arrow((x - 40, 575), (x, 575))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img" '
        f'aria-label="Corpora are packed into blocks, captured as targets, and train the student; the gap sets the '
        f'mixture, which the sampler draws from">'
        f'<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{_LINE}"/></marker></defs>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def _box(x: float, y: float, width: float, height: float, title: str, text: str, fill: str) -> list[str]:
    lines = textwrap.wrap(text, int((width - 16) / 6.6))
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{_LINE}"/>',
        _text(x + 10, y + 23, title, 15, bold=True),
        *(_text(x + 10, y + 43 + 17 * number, line, 12, quiet=True) for number, line in enumerate(lines)),
    ]


def _arrow(start: tuple[float, float], end: tuple[float, float], *label: str) -> list[str]:
    (x1, y1), (x2, y2) = start, end
    line = (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{_LINE}" stroke-width="2" '
        f'marker-end="url(#head)"/>'
    )
    if y1 == y2:
        middle = (x1 + x2) / 2
        places = [(middle, y1 - 8 if number == 0 else y1 + 18) for number in range(len(label))]
        said = [_text(x, y, word, 12, anchor="middle") for (x, y), word in zip(places, label, strict=True)]
    else:
        said = [_text(x1 + 8, (y1 + y2) / 2 + 4, word, 12) for word in label]
    return [line, *said]


def _text(
    x: float, y: float, text: str, size: int, *, bold: bool = False, quiet: bool = False, anchor: str = "start"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{_QUIET if quiet else _INK}" text-anchor="{anchor}"'
        f"{weight}>{escape(text)}</text>"
    )
