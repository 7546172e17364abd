"""The command that makes a student out of its teacher."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.app import app, loading_libraries, say


@app.command(name="init-student", short_help="Cut a student out of its teacher, by layers and width.")
def init_student(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Folder of a model, or its name on the hub.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder to write the student to.")],
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers to keep: how many (evenly, with both ends), or which: 0,1,2,5."),
    ] = None,
    width: Annotated[
        float | None, typer.Option("--width", help="Share of heads and channels to keep, such as 0.5.")
    ] = None,
) -> None:
    """Cut a student out of its teacher, if the family has no smaller model.

    Whole layers are kept, or of every layer the heads and channels with the largest weights. The result is an ordinary
    Hugging Face folder with the teacher's tokenizer. It must be trained before it is of any use.
    """
    with loading_libraries():
        from tasks.training.init_student import init_student as make
    made = make(teacher, folder, _layers(layers), width)
    say(f"student   {made.folder}")
    say(f"layers    {', '.join(map(str, made.layers))} of the teacher")
    say(f"size      {made.parameters:,} of {made.parameters_before:,} parameters")
    say("It predicts badly until it is trained: name it as student.model, set mixture.gap: log, and run ddk distill.")


def _layers(text: str | None) -> list[int] | int | None:
    from ddk.errors import UserError

    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--layers is '{text}'; write a number (11), or layers with commas between them (0,1,2,5)"
        ) from None
    return numbers if "," in text else numbers[0]
