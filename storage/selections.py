"""The selection of a domain's train blocks, and the scores that it was made from, as stored."""

from __future__ import annotations

from storage.reading.views import ScoreView, SelectionView


def open_scores(url: str) -> ScoreView:
    """A read-only view of the scores of one domain's train blocks.

    Args:
        url: `<root>/scores/<fingerprint>/<domain>.zarr`.

    Raises:
        StoreMissingError: no complete store of scores there.
    """
    return ScoreView(url, "train")


def open_selection(url: str) -> SelectionView:
    """A read-only view of the train blocks of one domain that were kept.

    Args:
        url: `<root>/selections/<fingerprint>/<domain>.zarr`.

    Raises:
        StoreMissingError: no complete store of a selection there.
    """
    return SelectionView(url, "train")
