"""How numbers are written for a reader: in the report, the model card, the terminal and Prefect's UI."""

from __future__ import annotations

import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from ddk.redaction import visible

UNKNOWN = "–"


def ppl(value: float) -> str:
    """12.3456 → '12.35'; 61015.966 → '61,016'; 1234567.8 → '1.23e+06'."""
    return _number(value, decimals=2)


def ratio(value: float) -> str:
    """1.23456 → '1.235'."""
    return _number(value, decimals=3)


def _number(value: float, *, decimals: int) -> str:
    if not math.isfinite(value):
        return UNKNOWN if math.isnan(value) else "∞" if value > 0 else "−∞"
    # Beyond a thousand decimals say nothing, and push a table beyond the edge of a terminal.
    return f"{value:,.{decimals if abs(value) < 1e3 else 0}f}" if abs(value) < 1e5 else f"{value:.2e}"


def number_or_unknown(value: float | None, decimals: int) -> str:
    """1.23456 → '1.23'; None → '–'."""
    return UNKNOWN if value is None else _number(value, decimals=decimals)


def change(value: float | None, decimals: int = 4) -> str:
    """0.01234 → '+0.0123'; −0.5 → '−0.5000'."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:+.{decimals}f}".replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    """0.1234 → '12.3 %'."""
    return UNKNOWN if value is None else f"{100 * value:.{decimals}f}\N{NO-BREAK SPACE}%"


def count(value: int) -> str:
    """1234567 → '1,234,567'."""
    return f"{value:,}"


def size(bytes_: float) -> str:
    """1234567 → '1.2 MB'; 999 → '999 B'. Decimal units, as disks are sold and billed."""
    scaled, unit = float(bytes_), 0
    while scaled >= 999.5 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.1f} {_UNITS[unit]}" if unit else f"{scaled:.0f} B"


_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def speed(tokens_per_second: float | None) -> str:
    """12345.6 → '12,346'; 3.456 → '3.5'; None → '–'."""
    if tokens_per_second is None:
        return UNKNOWN
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"


def duration(seconds: float) -> str:
    """3725 → '1 h 02 min'; 65 → '1 min 05 s'; 9.5 → '9.5 s'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def gap_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells of a row of `tasks.reporting.records.gap_table`: teacher's and student's perplexities, and both ratios."""
    perplexities = (ppl(row[name]) for name in ("teacher_ppl", "student_ppl_before", "student_ppl_after"))
    return (*perplexities, ratio(row["ratio_before"]), ratio(row["ratio_after"]))


def escape(text: str) -> str:
    """`text` as Markdown and HTML show it, on one line: '<b>|' → '&lt;b&gt;\\|'.

    An underscore inside a word (zh_books) is no markup and stays. What cannot be seen, such as the marks that turn
    the direction of writing round, becomes '�'.
    """
    text = visible(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def link(url: str, text: str | None = None) -> str:
    """Markdown of a link where a browser can follow it; of a path or an s3:// address the text alone, to copy."""
    shown = " ".join((text or url).split())
    if url.startswith(("http://", "https://")):
        return f"[{escape(shown)}](<{urllib.parse.quote(url, safe=_OF_URLS)}>)"
    # Between backticks nothing can be escaped.
    return escape(shown) if re.search(r"[`|<>&]", shown) or visible(shown) != shown else f"`{shown}`"


_OF_URLS = "/:?#@!$&'()*+,;=%~ "


def csv_cell(value: Any) -> Any:
    """What a table calculator shows as it is: a text that it would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table: the first `left` columns to the left, the others, numbers, to the right."""
    rule = [":---" if place < left else "---:" for place in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def few(names: Sequence[str], most: int) -> str:
    """'a, b, c and 4 more': the first so many, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
