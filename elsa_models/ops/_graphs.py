"""When a graph leaves PyTorch, and how operators stand for themselves in one and under `torch.vmap`."""
import warnings
from typing import Any, Callable, List, Sequence, Tuple, Union

import torch
from torch.autograd import forward_ad


# torch.compile must ask and not trace the question: PyTorch 2.7 to 2.11 take `is_exporting` for true in every graph.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export makes a graph, by itself or for ONNX. Like timm's, but false in torch.compile."""
    return torch.compiler.is_exporting()


# asked while torch.compile traces, as above: the transforms that it sees are in force then, and guarded
@torch.compiler.assume_constant_result
def wants_core_operators() -> bool:
    """Whether a graph is made that leaves PyTorch, or a transform is at work that an opaque operator would not obey.

    Such are forward-mode differentiation, of which custom operators know nothing (their tangents would be zero without
    a word), and those of `torch.func`.
    """
    return (
        torch.compiler.is_exporting() or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0)


def check(function: Callable, *args: Any) -> None:
    """Call what checks arguments; a trace is not told that it compares sizes, for those traced are what it checks."""
    if torch.jit.is_tracing():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            function(*args)
    else:
        function(*args)


def register_loop(operator: Any) -> None:
    """Let `torch.vmap` call a custom operator once for each entry: for gradients of several outputs at once."""
    def loop(info, in_dims: Sequence, *args) -> Tuple[Union[torch.Tensor, List[torch.Tensor]], Union[int, List[int]]]:
        results = [
            operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims)))
            for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results)]
        return stacked, [0] * len(stacked)

    operator.register_vmap(loop)
