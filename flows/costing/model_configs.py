"""The config of a model, without its weights and without the network: what `ddk plan --cost` reads.

Looked for in this order:

1. the model's own folder, where it is one
2. the hub's cache on this machine, where the model was fetched before
3. `flows/presets/models/<organisation>--<name>/config.json`: the dimensions of the models that the presets name, as
   their owners publish them
"""

from __future__ import annotations

import os
from typing import Any

import transformers

from ddk.cost.shape import ModelShape, shape_of
from ddk.errors import UserError, first_line

BUNDLED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "presets", "models")


def find_shape(model: str, revision: str | None, field: str) -> ModelShape:
    """The shape of a model, of whose folder only config.json need be there.

    Args:
        field: of the configuration that names it, for messages.

    Raises:
        UserError: there is no config, or not one of a causal language model.
    """
    config = _find(model, revision)
    if config is None:
        raise UserError(
            f"{field} '{model}' has no config.json here, and none comes with the presets; a plan downloads nothing: "
            f"fetch it (`hf download {model} config.json`), or name a folder that holds it"
        )
    try:
        return shape_of(config)
    except (ValueError, AttributeError, ImportError) as error:
        first = first_line(error)
        raise UserError(f"the size of {field} '{model}' cannot be worked out from its config: {first}") from error


def _find(model: str, revision: str | None) -> Any | None:
    bundled = os.path.join(BUNDLED, model.replace("/", "--"))
    places = [(model, revision), *([(bundled, None)] if os.path.isdir(bundled) else [])]
    for place, at in places:
        try:
            return transformers.AutoConfig.from_pretrained(
                place, revision=at, trust_remote_code=False, local_files_only=True
            )
        except OSError:
            continue
        except ValueError as error:
            first = first_line(error)
            raise UserError(
                f"the config.json of '{place}' cannot be read, and a plan runs no code of a model's own: {first}"
            ) from error
    return None
