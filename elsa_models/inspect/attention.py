"""Where local attention looks."""
from typing import List, NamedTuple

import torch
import torch.nn as nn

from .._modes import evaluating
from ..layers import Mixer


class AttentionLayer(NamedTuple):
    """The local attention of one layer for one image."""
    name: str
    kernel_size: int
    dilation: int
    weights: torch.Tensor  # H, W, heads, K, K


def _is_local(module: nn.Module) -> bool:
    # mixers with a neighbourhood say how large it is
    is_mixer = isinstance(module, Mixer) and hasattr(module, 'kernel_size')
    return is_mixer and type(module).attention_map is not Mixer.attention_map


def has_local_attention(model: nn.Module) -> bool:
    """Whether a model has layers that `attention_layers` would find."""
    return any(_is_local(m) for m in model.modules())


@torch.no_grad()
def attention_layers(model: nn.Module, image: torch.Tensor) -> List[AttentionLayer]:
    """Run a model on one image and collect the attention of its mixers with a neighbourhood of K x K taps.

    Args:
        model: Any model, unchanged afterwards.
        image: (C, H, W), normalised.

    Returns:
        Layers in the order of their running; none where no mixer has such attention.
    """
    layers = []

    def collect(name):
        def hook(module, args):
            K = module.kernel_size
            weights = module.attention_map(args[0])
            layers.append(AttentionLayer(
                name, K, getattr(module, 'dilation', 1), weights[0].unflatten(-1, (K, K)).float().cpu()))
        return hook

    handles = [m.register_forward_pre_hook(collect(name)) for name, m in model.named_modules() if _is_local(m)]
    try:
        with evaluating(model):
            model(image.unsqueeze(0).to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return layers
