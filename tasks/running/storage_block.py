"""Credentials for the storage from a Prefect block, so that they need not stand in the environment of every worker.

    Secret(value='{"key": "…", "secret": "…", "endpoint_url": "…"}').save("my-s3")     # once, by whoever knows them
    storage_block: my-s3                                                               # in the configuration

A `Secret` block holds s3fs's options as a JSON object, written as text. Prefect hides a text behind asterisks, but
shows every value of a Python dict (`Secret(value={…})`) and of the `settings` of a `RemoteFileSystem` block in plain
text. Both are accepted, with a warning in the log. The configuration, and thus the run's folder, holds only the block's
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.filesystems import RemoteFileSystem

from ddk.errors import UserError
from storage.errors import StoreError
from storage.files import settings
from tasks.showing.progress import logger

_KINDS: dict[str, type[Block]] = {"secret": Secret, "remote-file-system": RemoteFileSystem}


def use_storage_block(name: str | None) -> None:
    """Let every later call of the storage, in this process, use the options of a Prefect block; None changes nothing.

    Args:
        name: 'my-s3', or with the kind of the block before it: 'secret/my-s3', 'remote-file-system/my-s3'.

    Raises:
        UserError: there is no such block, or it holds no options; its content is never shown.
    """
    if name is None:
        return
    block = _load(name)
    protocol, options = _options(block, name)
    if not (isinstance(block, Secret) and isinstance(block.value.get_secret_value(), str)):
        logger.warning("Prefect shows the content of the block '%s' in plain text; make it a Secret of JSON text", name)
    try:
        settings.use_options(protocol, options)
    except StoreError as error:
        raise UserError(f"the Prefect block '{name}' (storage_block): {error}") from None
    logger.info("storage: %s is opened with the Prefect block '%s'", protocol, name)


def _load(name: str) -> Block:
    kind, _, rest = name.rpartition("/")
    if kind and kind not in _KINDS:
        raise UserError(f"storage_block: '{name}' has an unsupported type; it may be {' or '.join(_KINDS)}")
    for candidate in [kind] if kind else _KINDS:
        try:
            return _KINDS[candidate].load(rest)  # type: ignore[return-value]
        except ValueError:  # there is none of this kind
            continue
    raise UserError(
        f"Prefect has no block '{name}' (storage_block); save one: "
        f'Secret(value=\'{{"key": "…", "secret": "…", "endpoint_url": "…"}}\').save("{rest}")'
    )


def _options(block: Block, name: str) -> tuple[str, Mapping[str, Any]]:
    """The protocol and the options."""
    if isinstance(block, RemoteFileSystem):
        return block.basepath.split("://")[0], block.settings
    value = block.get() if isinstance(block, Secret) else None
    if not isinstance(value, dict):
        raise UserError(
            f"the Prefect block '{name}' (storage_block) holds no JSON object of s3fs's options (key, secret, "
            f"endpoint_url, …); save it again with one"
        )
    return "s3", value
