"""The worker extension that the capture benchmark loads into vLLM: ours, and the floor that it is measured against.

capture   what the product does
floor     the same forward pass and the projection of every position to logits, and nothing done with them
bare      the forward pass alone; the engine projects each sequence's last position
"""

from __future__ import annotations

from typing import Any

import torch

from tasks.teachers.vllm_worker import CaptureExtension


class BenchExtension(CaptureExtension):
    ddk_mode = "capture"

    def ddk_set_mode(self, mode: str) -> None:
        self.ddk_mode = mode

    def _ddk_capture_chunk(
        self, model: Any, hidden_ND: torch.Tensor, rows_N: Any, places_N: Any, labels_N: Any
    ) -> None:
        if self.ddk_mode == "capture":
            super()._ddk_capture_chunk(model, hidden_ND, rows_N, places_N, labels_N)
        elif self.ddk_mode == "floor":
            model.compute_logits(hidden_ND.index_select(0, torch.from_numpy(rows_N)))
