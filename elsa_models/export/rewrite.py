"""Models rewritten for inference runtimes: the same outputs from operators that these run fast."""
import copy
import itertools

import torch
import torch.nn as nn

from ..layers import Mixer


def rewrite_for_runtimes(model: nn.Module) -> nn.Module:
    """A copy of a model, in eval mode, whose mixers have the form that runtimes run fast.

    Outputs are those of the model up to rounding. The copy is for export: its parameters have other names, and those
    that do not change are the model's own, where timm's `reparameterize_model` copies all.
    """
    tensors = itertools.chain(
        model.parameters(),
        model.buffers(),
        # those that hooks compute, as of pruning and weight norm; what has a history cannot be copied
        (x for module in model.modules() for x in vars(module).values() if isinstance(x, torch.Tensor)),
    )
    shared = {id(x): x for x in tensors}
    model = copy.deepcopy(model, shared)
    for module in list(model.modules()):
        if isinstance(module, Mixer):
            module.reparameterize()
    return model.eval()  # what is new in it as well
