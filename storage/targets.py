"""Teacher targets of a domain, as stored."""

from __future__ import annotations

import numpy as np

from ddk.types import Split
from storage.views import TargetView


def open_targets(url: str, split: Split = "train") -> TargetView:
    """A read-only view of one domain's teacher targets.

    Args:
        url: `<root>/targets/<fingerprint>/<domain>.zarr`.

    Raises:
        StoreMissingError: no complete store of targets there.
    """
    return TargetView(url, split)


def teacher_perplexity(url: str) -> float:
    """ℓ_T of the domain: exp(−mean log-probability of the true token) over its validation blocks."""
    true_logprobs_NL = open_targets(url, "validation").true_logprobs()
    return float(np.exp(-np.mean(true_logprobs_NL, dtype=np.float64)))
