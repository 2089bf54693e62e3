"""Counting multiply-accumulates.

The convention is that of the papers: convolutions, linear layers and the two matrix products of attention, or what a
mixer has in their place. Local attention over K x K taps of C channels and N pixels is 2 * K ** 2 * C * N: once for the
attention and once for the ghost head. Norms, activations, softmax, biases and the resampling of positions are not
counted.
"""
from collections import Counter
from typing import Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.models._input import get_model_input_config
from torch.utils.flop_counter import FlopCounterMode

from .._modes import evaluating
from ..layers import Mixer


def count_macs_by_op(model: nn.Module, input_size: Optional[Tuple[int, int, int]] = None) -> Dict[str, int]:
    """Multiply-accumulates of one forward pass of one image, by operator.

    Nothing is computed: the pass runs on the meta device, whatever the device of the model.

    Args:
        model: Any model of images, unchanged afterwards.
        input_size: Channels, height and width of the image; the model's own if None.

    Returns:
        Multiply-accumulates by the name of the operator, or that which a mixer gives to what no counter sees.

    Raises:
        ValueError: The input size is not three positive numbers.
    """
    if input_size is None:
        input_size = get_model_input_config(model)['input_size']
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f'input_size: got {input_size}, must be channels, height and width, all positive.')
    tensors = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    dtype = next((x.dtype for x in tensors.values() if x.is_floating_point()), None)
    tensors = {k: torch.empty_like(x, device='meta') for k, x in tensors.items()}
    x = torch.empty(1, *input_size, device='meta', dtype=dtype)
    counter = FlopCounterMode(display=False)
    extra: Counter[str] = Counter()

    def count_extra(module, args, output):
        extra.update(module.extra_macs(tuple(args[0].shape)))

    hooks = [m.register_forward_hook(count_extra) for m in model.modules() if isinstance(m, Mixer)]
    try:
        with evaluating(model), torch.no_grad(), counter:
            torch.func.functional_call(model, tensors, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    by_op = {str(op): flops // 2 for op, flops in counter.get_flop_counts()['Global'].items()}
    return {**by_op, **extra}


def count_macs(model: nn.Module, input_size: Optional[Tuple[int, int, int]] = None) -> int:
    """Multiply-accumulates of one forward pass of one image. See `count_macs_by_op`."""
    return sum(count_macs_by_op(model, input_size).values())
