"""`ddk new`: writes a commented configuration of one's own."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from ddk.errors import UserError
from flows.commands.app import app, command, say


@app.command(short_help="Write a commented configuration file of your own.")
def new(
    path: Annotated[str, typer.Argument(metavar="FILE", help="YAML file to write; it must not exist yet.")],
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Begin with a preset, such as quickstart.")
    ] = None,
) -> None:
    """Write a commented configuration file to edit; a file that exists is never overwritten."""
    text = configuration(path, preset)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists and is not overwritten; name another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name a file in a folder that is there") from None
    say(f"wrote     {path}")
    changes = [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if _is_to_change(line)]
    for change in changes:
        say(f"change    line {change}")
    say(f"next      {command()} plan {path}   (shows what would be done, and what is still wrong)")


def configuration(path: str, preset: str | None) -> str:
    """The text of a new configuration file.

    Args:
        path: of the file, whose name the run gets.
        preset: name of one in `flows/presets`; None: a small configuration with comments.

    Raises:
        UserError: there is no such preset.
    """
    folder = presets_folder()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.splitext(os.path.basename(path))[0]).strip("-._")[:80] or "my-run"
    if preset is None:
        with open(os.path.join(folder, "own", "config.yaml"), encoding="utf-8") as file:
            return file.read().replace("NAME", name)
    there = sorted(one.removesuffix(".yaml") for one in os.listdir(folder) if one.endswith(".yaml"))
    wanted = preset.removesuffix(".yaml")
    if wanted not in there:
        raise UserError(f"there is no preset '{preset[:80]}'; there are {', '.join(there)}")
    with open(os.path.join(folder, f"{wanted}.yaml"), encoding="utf-8") as file:
        text = file.read()
    text = re.sub(r"^run: .*$", f"run: {name}", text, count=1, flags=re.MULTILINE)
    return re.sub(r"^root: \./.*$", f"root: ./{name}-run", text, count=1, flags=re.MULTILINE)


def presets_folder() -> str:
    """Where the presets are installed."""
    import flows.presets

    return os.path.dirname(os.path.abspath(flows.presets.__file__))


def _is_to_change(line: str) -> bool:
    """Whether a line holds what nobody but the user knows: marked so, or in the presets' placeholder bucket."""
    if line.lstrip().startswith("#"):
        return False
    return "# CHANGE" in line or "my-bucket" in line
