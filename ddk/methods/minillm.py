"""minillm: as kd, with the reverse KL.

This is the baseline that the DDK paper compares under this name and describes as replacing the forward KL by the
reverse one: offline, on the tokens of the corpus. The original (Gu et al., ICLR 2024) minimises the reverse KL over
texts that the student itself writes, by policy gradient, with teacher-mixed sampling, length normalisation and a
language-modelling loss beside it. None of this is implemented here, nor in the DDK paper's comparison.

Over stored tokens the reverse KL is that of the bucketed or renormalised distributions (`ddk.loss`).
"""

from __future__ import annotations

from ddk.methods.base import Method
from ddk.methods.fixed import fixed

MINILLM = Method(next_mixture=fixed("proportional"), follows_gap=False, loss={"divergence": "reverse_kl"})
