"""What attentions along an axis share: tables of learned values by distance, and how many lines they take at once.

A table (..., 2 * L - 1) covers maps of L pixels: its columns are the distances 1 - L to L - 1, key minus query.
"""
import torch

from .sizes import sizes_are_open


def fit_table(table: torch.Tensor, length: int, beyond: str, keep_sums: bool = False) -> torch.Tensor:
    """A table (..., 2 * L - 1) for maps of another length: (..., 2 * length - 1).

    Shorter maps take the central columns: a distance means the same in maps of all lengths.

    Args:
        table: Values by distance.
        length: Pixels of the map along the axis.
        beyond: What longer maps take for distances that the table lacks: 'clamp', its last column on that side;
            'zero', nothing; 'resample' stretches the table to the map, by linear interpolation around distance 0.
        keep_sums: Divide a stretched table by as much, so that sums over the pixels of a line keep their size.
    """
    last = (table.shape[-1] - 1) // 2  # the largest distance
    if not sizes_are_open():
        if length <= last + 1:
            return table[..., last + 1 - length:last + length]
    distances = torch.arange(1 - length, length, device=table.device)
    if beyond == 'resample' and last > 0:
        longest = distances[-1:].clamp(min=last)
        place = (distances + longest) * last  # in columns, times `longest`: whole numbers are exact
        low = place // longest
        high = (low + 1).clamp(max=2 * last)
        weight = (place - low * longest).to(table.dtype) / longest
        out = torch.lerp(table.index_select(-1, low), table.index_select(-1, high), weight)
        if keep_sums:
            out = out * ((last + 1) / (longest + 1).to(table.dtype))
        return out
    out = table.index_select(-1, (distances + last).clamp(min=0, max=2 * last))
    if beyond == 'zero':
        out = out * (distances.abs() <= last).to(table.dtype)
    return out


def by_pair(table: torch.Tensor) -> torch.Tensor:
    """A table (..., 2 * L - 1) by pairs of pixels, (..., L, L): the value at [query, key] is that of key - query."""
    length = (table.shape[-1] + 1) // 2
    pixels = torch.arange(length, device=table.device)
    index = pixels - pixels[:, None] + (length - 1)  # query, key
    return table.index_select(-1, index.flatten()).unflatten(-1, (length, length))


torch.fx.wrap('fit_table')
torch.fx.wrap('by_pair')


def lines_at_once(L: int, num_maps: int, is_cuda: bool) -> int:
    """How many lines of L pixels, each with `num_maps` maps of L x L weights, to work on at a time.

    As many as stay in a core's cache: a million entries, fewer passes over memory, and no map of the whole image. On
    a GPU as many as keep it busy.
    """
    entries = 134_217_728 if is_cuda else 1_048_576
    return max(entries // (L * L * num_maps), 1)
