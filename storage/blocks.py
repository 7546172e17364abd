"""Token blocks of a domain, as stored."""

from __future__ import annotations

from ddk.values import Split
from storage.reading.views import BlockView


def open_blocks(url: str, split: Split = "train") -> BlockView:
    """A read-only view of one domain's token blocks.

    Args:
        url: `<root>/blocks/<fingerprint>/<domain>.zarr`.

    Raises:
        StoreMissingError: no complete store of blocks there.
    """
    return BlockView(url, split)
