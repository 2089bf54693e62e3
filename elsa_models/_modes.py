"""Training and evaluation mode of modules."""
from contextlib import contextmanager
from typing import Iterator

import torch.nn as nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, after which every module has its own mode again: parts of a model in training may be frozen."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
