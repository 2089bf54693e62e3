"""Statistics of batch norms, found anew."""
from typing import Iterable

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Replace the running statistics of every BatchNorm by those of the images given.

    For models that are used on another size than they were trained on, or whose weights have been averaged. The
    statistics of Refiner-ViT need it most: they belong to attention maps, whose entries are about 1 / N for N tokens. A
    few hundred images do. Weights stay, dropout is off, and each batch counts alike; let them be equally large.

    Args:
        model: On any device, in any mode; it keeps both.
        batches: Images (B, C, H, W), prepared as for evaluation.

    Returns:
        The number of images.

    Raises:
        ValueError: There are no images, or the model has no BatchNorm with running statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f'model: {type(model).__name__} has no BatchNorm with running statistics.')
    device = next(norms[0].buffers()).device
    modes = [(m, m.training) for m in model.modules()]
    before = [(bn, bn.momentum, [x.clone() for x in bn.buffers()]) for bn in norms]
    count = 0
    try:
        model.eval()
        for bn in norms:
            bn.train()
            bn.reset_running_stats()
            bn.momentum = None  # the average of all batches
        for images in batches:
            if len(images):
                model(images.to(device))
                count += len(images)
        if not count:
            raise ValueError('batches: got no images.')
    except BaseException:  # a model with half its statistics is of no use
        for bn, _, state in before:
            for x, old in zip(bn.buffers(), state):
                x.copy_(old)
        raise
    finally:
        for bn, momentum, _ in before:
            bn.momentum = momentum
        for module, training in modes:
            module.training = training
    return count
