"""First calls, made ahead of time."""
import torch
import torch.nn as nn
from timm.models._input import get_model_input_config


def warm_up(*models: nn.Module, train: bool = False) -> None:
    """Let models compute one image of zeros each, so that no later image waits for what a first one has to.

    On a CPU that is above all Numba's kernels, which are compiled once on a machine, some seconds for each, and kept on
    disk; later processes load them. `logging` at INFO says which. Call it when a server starts, or an image of it is
    built. Models keep their mode, weights, gradients and statistics.

    Args:
        models: Models of images, on any device and in any dtype, as they are to be used.
        train: Make the gradients' kernels ready, too.
    """
    for model in models:
        modes = [(module, module.training) for module in model.modules()]
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = next(model.parameters())
        images = torch.zeros(1, *get_model_input_config(model)['input_size'], device=first.device, dtype=first.dtype)
        try:
            model.eval()
            with torch.no_grad():
                model(images)
            if train and parameters:
                with torch.enable_grad():
                    torch.autograd.grad(model(images).sum(), parameters, allow_unused=True)
        finally:
            for module, training in modes:
                module.training = training
