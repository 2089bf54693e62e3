"""The cost of local attention, for `torch.utils.flop_counter.FlopCounterMode`.

Counted as the papers count: over K x K taps, C channels and N pixels the attention costs `2 * K ** 2 * C * N`
operations, two to a multiply-accumulate, and the ghost head as many again. Backward costs twice the forward pass, as
for the matrix products and convolutions that PyTorch counts. Softmax is not counted.
"""
from typing import Optional, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from . import api  # noqa: F401 - it defines the operators


def _flops(
        value_shape: Sequence[int],
        logits_shape: Sequence[int],
        ghost_mul_shape: Optional[Sequence[int]],
        ghost_add_shape: Optional[Sequence[int]],
) -> int:
    B, H, W, C = value_shape
    products = 1 if ghost_mul_shape is None and ghost_add_shape is None else 2
    return 2 * products * logits_shape[-1] * C * B * H * W


@register_flop_formula(torch.ops.elsa_models.local_attention)
def local_attention_flops(
        value_shape, logits_shape, ghost_mul_shape, ghost_add_shape, *args, out_shape=None, **kwargs) -> int:
    """Operations of the forward pass."""
    return _flops(value_shape, logits_shape, ghost_mul_shape, ghost_add_shape)


@register_flop_formula(torch.ops.elsa_models.local_attention_backward)
def local_attention_backward_flops(
        grad_shape, value_shape, logits_shape, ghost_mul_shape, ghost_add_shape, *args, out_shape=None, **kwargs
) -> int:
    """Operations of the backward pass."""
    return 2 * _flops(value_shape, logits_shape, ghost_mul_shape, ghost_add_shape)
