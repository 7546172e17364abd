"""The reference of the configuration is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from flows.config import Config, load_config
from flows.pages.reference import PATH, render


def test_the_page_in_docs_is_up_to_date() -> None:
    assert Path(PATH).read_text(encoding="utf-8") == render(), "run `make reference`"


def test_every_field_is_described() -> None:
    page = render()
    for section in (Config, *(f.annotation for f in Config.model_fields.values())):
        for name, field in getattr(section, "model_fields", {}).items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
            assert f"| `{name}` |" in page
    assert "## `teacher.codec`" in page, "a section within a section"


def test_the_example_in_the_readme_is_a_valid_configuration() -> None:
    readme = (Path(PATH).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert len(examples) == 1
    assert Config.model_validate(yaml.safe_load(examples[0])).teacher.k == 64


def test_the_quickstart_preset_is_valid_and_its_files_are_there() -> None:
    config = load_config(str(Path(PATH).parents[1] / "flows" / "presets" / "quickstart.yaml"))
    files = [*(url for domain in config.domains.values() for url in (*domain.train, *domain.validation))]
    assert len(files) == 10
    for path in (*files, config.teacher.model, config.student.model):
        assert Path(path).exists(), path
