"""Finds out what a model computes from its structure, not from its present weights.

A soft cap is the identity near zero, and every scale maps zeros to zeros. If two ways of computing were compared on a
model's own small logits, they could agree now and differ after training. Therefore large synthetic values of both signs
are fed in at the point where the two ways differ, and the results are compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

_TOKENS = 8
_LARGE = 300.0
"""Far beyond every soft cap in use (Gemma's are 30 and 50)."""
_ATTENTION_SIZES = (3.0, 30.0, 300.0)
"""Standard deviations of the attention's logits at which two implementations are compared."""
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap", "attention_softcap")


def empty_model(config: Any, *, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The architecture on the meta device: shapes and no numbers, a fraction of a second whatever its size.

    Raises:
        ValueError: it is no causal language model that transformers knows; whatever else a model's own code raises.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=dtype
        )
    return model.eval()


@torch.no_grad()
def is_projection(model: Any) -> bool:
    """Whether the logits are just the output embedding applied to the last hidden states of `model.base_model`.

    The model's own forward pass runs with the decoder's output and the projection's output replaced: what the
    projection then reads must be the one, and the logits must be the other, in training as in evaluation. Scales, soft
    caps, norms, multipliers and masks between them show, whatever the weights are. In doubt it is False: the model's
    own logits are always right.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if type(head) is not torch.nn.Linear or body is model or not isinstance(body, torch.nn.Module):
        return False
    if head._forward_hooks or head._forward_pre_hooks or torch.nn.utils.parametrize.is_parametrized(head):
        return False
    was_training = model.training
    device = head.weight.device
    tokens = torch.arange(_TOKENS, device=device).remainder(head.weight.shape[0])[None]
    generator = torch.Generator().manual_seed(0)
    hidden = (_LARGE * torch.randn(1, _TOKENS, head.in_features, generator=generator)).to(device)
    logits = (_LARGE * torch.randn(1, _TOKENS, head.out_features, generator=generator)).to(device)
    try:
        # A model's dropout draws from the training's random numbers, which are to be as they were.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            alone = body(input_ids=tokens, use_cache=False).last_hidden_state
            if not _passes(model, head, body, tokens, hidden, logits, alone):
                return False
            model.train()
            return _passes(model, head, body, tokens, hidden, logits, None)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(was_training)


def _passes(
    model: Any, head: Any, body: Any, tokens: Tensor, hidden: Tensor, logits: Tensor, alone: Tensor | None
) -> bool:
    """One forward pass of `is_projection`. `alone`: what the decoder gives when it is called with the tokens alone."""
    seen: dict[str, Any] = {"body": 0, "head": 0, "same": True}

    def replaced(module: Any, arguments: Any, named: Any, output: Any) -> Any:
        seen["body"] += 1
        given = [*arguments, *named.values()]
        plain = [one for one in given if one is None or isinstance(one, bool) or one is tokens]
        found = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        seen["same"] &= len(plain) == len(given) and found.shape == hidden.shape
        if alone is not None and alone.device.type != "meta":
            # NaN weights are somebody else's to find.
            seen["same"] &= torch.allclose(found, alone, rtol=1e-4, atol=1e-4, equal_nan=True)
        put_in = hidden.to(found.dtype, copy=True)
        if isinstance(output, tuple):
            return (put_in, *output[1:])
        changed = copy.copy(output)
        changed["last_hidden_state"] = put_in
        if changed.get("hidden_states") is not None:
            changed["hidden_states"] = (*changed["hidden_states"][:-1], put_in)
        return changed

    def projected(given: Tensor) -> Tensor:
        seen["head"] += 1
        seen["same"] &= torch.equal(given.float(), hidden.to(given.dtype).float())
        return logits.to(given.dtype, copy=True)  # some models write into them

    with contextlib.ExitStack() as undo:
        hook = body.register_forward_hook(replaced, with_kwargs=True)
        undo.callback(hook.remove)
        undo.enter_context(patch.object(head, "forward", projected))
        found = model(input_ids=tokens, use_cache=False).logits
    same = found.shape == logits.shape and torch.equal(found.float(), logits.to(found.dtype).float())
    return bool(seen["same"] and seen["body"] == seen["head"] == 1 and same)


def attention_of(config: Any, *, trust_remote_code: bool = False) -> str | None:
    """The attention implementation under which transformers computes what the model is; None: its own choice.

    The fast one ('sdpa') ignores what it has no argument for, such as Gemma 2's soft cap. Each attention of the model
    is compared with its plain form on synthetic queries and keys; where they differ, or cannot be compared, the plain
    form ('eager') is it. No weights are needed.
    """
    verdicts: list[bool] = []
    with contextlib.suppress(Exception):  # whatever a model's code raises on a device without numbers
        # Experts' products on the meta device know bfloat16 alone.
        model = empty_model(config, trust_remote_code=trust_remote_code, dtype=torch.bfloat16)
        if model.config._attn_implementation != "sdpa":
            return None
        with _watching(verdicts), torch.no_grad():
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta"), use_cache=False)
        return None if all(verdicts) else "eager"
    # It did not run to its end. What did run was compared; for the rest the config is asked.
    text = config.get_text_config()
    capped = any(getattr(text, name, None) for name in _SOFT_CAPS)
    return "eager" if capped or not all(verdicts) else None


@contextlib.contextmanager
def _watching(verdicts: list[bool]) -> Iterator[None]:
    """Note of every attention that runs whether its fast form computes what its plain form does."""
    chosen = AttentionInterface.get_interface

    def watched(interface: Any, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        fast = chosen(interface, name, plain)

        def run(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **named: Any
        ) -> Any:
            if fast is not plain:
                verdicts.append(_agree(fast, plain, module, query, key, value, named))
            return fast(module, query, key, value, attention_mask, **named)

        return run

    # It looks at the positions' values, to find several sequences in one; here is one.
    unpacked = patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with patch.object(AttentionInterface, "get_interface", watched), unpacked:
        yield


def _agree(
    fast: Callable[..., Any],
    plain: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    named: dict[str, Any],
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def made(like: Tensor, size: float = 1.0) -> Tensor:
        return size * torch.randn(like.shape, generator=generator)

    named = {
        name: made(one) if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in named.items()
        if not isinstance(one, Tensor) or one.is_floating_point()
    }
    queries, keys = query.shape[-2], key.shape[-2]
    causal = torch.ones(queries, keys).tril(keys - queries).bool()[None, None]
    added = torch.zeros(1, 1, queries, keys).masked_fill(~causal, torch.finfo(torch.float32).min)
    scaling = named.get("scaling") or query.shape[-1] ** -0.5
    try:
        for size in _ATTENTION_SIZES:
            each = (size / (scaling * query.shape[-1] ** 0.5)) ** 0.5
            inputs = made(query, each), made(key, each), made(value)
            one, other = (form(module, *inputs, added, **named)[0] for form in (fast, plain))
            if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-3):
                return False
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True
