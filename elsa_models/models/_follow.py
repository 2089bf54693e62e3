"""What becomes of the entries of a state dict that is given other names and another layout."""
from typing import Callable, Dict

import torch

StateDict = Dict[str, torch.Tensor]


def follow(found: StateDict, rename: Callable[[StateDict], StateDict]) -> Dict[str, StateDict]:
    """Where each entry goes.

    Every value has a number. Numbers can be renamed, split, joined and reordered as the values are, and tell of each
    result which entries it consists of.

    Args:
        found: A state dict.
        rename: Gives it other names and another layout, and computes nothing. See `Family.to_own_names`.

    Returns:
        For each entry the results that hold values of it, as places in it, from 0; no results if it was dropped.
    """
    starts, total = {}, 0
    for key, x in found.items():
        starts[key] = total
        total += x.numel()
    dtype = torch.int32 if total < 2 ** 31 else torch.int64
    numbers = {
        k: torch.arange(n, n + found[k].numel(), dtype=dtype).view(found[k].shape) for k, n in starts.items()}
    keys, bounds = list(starts), torch.tensor([n + found[k].numel() for k, n in starts.items()])
    out: Dict[str, StateDict] = {k: {} for k in keys}
    for target, places in rename(numbers).items():
        for i in torch.bucketize(places.flatten(), bounds, right=True).unique().tolist():
            out[keys[i]][target] = places - starts[keys[i]]
    return out
