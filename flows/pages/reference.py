"""Writes the reference of the configuration from its typed sections: `make reference`.

The text of each field is the docstring under it, so the reference cannot disagree with the code; a test keeps
`docs/configuration.md` up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.config import Config

PATH = str(Path(__file__).resolve().parents[2] / "docs" / "configuration.md")

HEAD = """# Configuration

`make reference` writes this page from the code. One YAML file describes a run. Before anything starts, an unknown field
or a value out of range is refused with an error that names it. Relative paths are relative to the file.
`--set section.field=value` replaces one field for one call. The file must not hold secrets: credentials come from the
environment, or from a Prefect block ([storage](storage.md)).
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section("The file", Config), *_sections(Config)])


def _sections(within: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every section below one, each followed by those within it (`teacher`, `teacher.codec`)."""
    for name, field in within.model_fields.items():
        model = _model_of(field.annotation)
        if model is not None:
            title = f"{prefix}{name}.<domain>" if get_origin(field.annotation) is dict else f"{prefix}{name}"
            yield from _section(f"`{title}`", model)
            yield from _sections(model, f"{title}.")
        for model in _choices_of(field.annotation):
            yield from _section(f"`{prefix}{name}` {_tag_of(model)}", model)


def _section(title: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    if model is not Config and model.__doc__:
        yield f"{model.__doc__.strip().splitlines()[0]}\n"
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{name}` | {_type(field)} | {_default(field)} | {text} |"
    yield ""


def _type(field: FieldInfo) -> str:
    section = _model_of(field.annotation)
    if _choices_of(field.annotation):
        return "section"
    if section is not None:
        return "sections" if get_origin(field.annotation) is dict else "section"
    return _named(field.annotation).replace("|", "\\|")


def _named(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if isinstance(annotation, str | int):
        return f"`{annotation}`"
    if get_origin(annotation) in (list, tuple, Annotated):
        each = _named(get_args(annotation)[0])
        return each if get_origin(annotation) is Annotated else f"list of {each}"
    if get_origin(annotation) is dict:
        return "number by name"
    if get_args(annotation):
        return " or ".join(_named(part) for part in get_args(annotation))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[annotation.__name__]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    value = list(value) if isinstance(value, tuple) else value
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _choices_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that one field may hold, told apart by their first field."""
    found = [_model_of(part) for part in get_args(annotation)]
    models = [model for model in found if model is not None]
    nested = [model for part in get_args(annotation) if _model_of(part) is None for model in _choices_of(part)]
    return nested or (models if len(models) > 1 else [])


def _tag_of(model: type[BaseModel]) -> str:
    """`by: difference`."""
    name, field = next(iter(model.model_fields.items()))
    return f"with `{name}: {get_args(field.annotation)[0]}`"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section behind a field, also where it is one a domain."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


if __name__ == "__main__":
    page = render()  # first: an error must not leave an empty page
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(page)
