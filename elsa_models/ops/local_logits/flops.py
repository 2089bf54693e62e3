"""The cost of local logits, for `torch.utils.flop_counter.FlopCounterMode`.

Over K x K taps, C channels and N pixels the products cost `2 * K ** 2 * C * N` operations, two to a
multiply-accumulate. Backward costs twice the forward pass, as for the matrix products that PyTorch counts. Biases are
not counted.
"""
import torch
from torch.utils.flop_counter import register_flop_formula

from . import api  # noqa: F401 - it defines the operators


@register_flop_formula(torch.ops.elsa_models.local_logits)
def local_logits_flops(
        query_shape, key_shape, row_bias_shape, column_bias_shape, kernel_size, *args, out_shape=None, **kwargs) -> int:
    """Operations of the forward pass."""
    B, H, W, C = query_shape
    return 2 * kernel_size ** 2 * C * B * H * W


@register_flop_formula(torch.ops.elsa_models.local_logits_backward)
def local_logits_backward_flops(
        grad_shape, query_shape, key_shape, has_row_bias, has_column_bias, kernel_size, *args, out_shape=None, **kwargs,
) -> int:
    """Operations of the backward pass."""
    B, H, W, C = query_shape
    return 2 * 2 * kernel_size ** 2 * C * B * H * W
