"""The extension that vLLM's worker imports. It is imported only there, before the model is built.

This is therefore also the place to correct models that vLLM computes differently from their authors' code.
"""

from __future__ import annotations

from vllm.model_executor.models import bloom

from tasks.teachers.vllm_worker import CaptureExtension

__all__ = ["CaptureExtension"]

_activation = bloom.get_act_fn


def _bloom_activation(name: str) -> object:
    """vLLM gives Bloom the exact GELU, and Bloom was trained with its tanh approximation: 1.8e-3 nat on two layers."""
    return _activation("gelu_pytorch_tanh" if name == "gelu" else name)


bloom.get_act_fn = _bloom_activation
