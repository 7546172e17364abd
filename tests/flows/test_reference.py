"""The reference of the configuration is what the code says."""

from __future__ import annotations

from pathlib import Path

from flows.config import Config
from flows.reference import PATH, render


def test_the_page_in_docs_is_up_to_date() -> None:
    assert Path(PATH).read_text(encoding="utf-8") == render(), "run `make reference`"


def test_every_field_is_described() -> None:
    page = render()
    for section in (Config, *(f.annotation for f in Config.model_fields.values())):
        for name, field in getattr(section, "model_fields", {}).items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
            assert f"| `{name}` |" in page
