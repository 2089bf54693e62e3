"""Recorded numbers of the ResNets with attention, in data/resnet: see data/PROVENANCE.md."""
import json
import math
import re
import zlib
from typing import Any, Dict, Tuple

import numpy as np
import torch
from helpers import DATA

RECORDS = DATA / 'resnet'


def record(name: str) -> Tuple[Dict[str, Any], Dict[str, torch.Tensor]]:
    """What `name`.npz says of itself, and its arrays in float64."""
    with np.load(RECORDS / f'{name}.npz') as arrays:
        meta = json.loads(str(arrays['meta']))
        return meta, {k: torch.from_numpy(arrays[k]).double() for k in arrays.files if k != 'meta'}


def part(arrays: Dict[str, torch.Tensor], prefix: str) -> Dict[str, torch.Tensor]:
    """The arrays behind a prefix: 'p.' for parameters and buffers, 'g.' for gradients, 'after.' for later buffers."""
    return {k[len(prefix):]: x for k, x in arrays.items() if k.startswith(prefix)}


def _keyed(name: str, shape: Tuple[int, ...]) -> torch.Tensor:
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).double()
    if name.endswith('running_mean'):
        return .05 * r
    if name.endswith('running_var'):
        return 1 + .1 * r.abs()
    if name.endswith('.weight') and len(shape) == 1:
        return 1 + .1 * r
    if name.endswith('.bias'):
        return .05 * r
    if re.search(r'\.(relative|rel_row|rel_col)$', name):
        return .2 * r
    return r / math.sqrt(math.prod(shape[1:]))


def keyed_state_dict(listing: str) -> Dict[str, torch.Tensor]:
    """Weights in float64 that depend on names and shapes alone, by the listing of these.

    Args:
        listing: Name of the file, '<listing>_keys.txt'.
    """
    out = {}
    for line in (RECORDS / f'{listing}_keys.txt').read_text().splitlines():
        name, shape, dtype = re.fullmatch(r'(\S+) \[(.*)\] (\w+)', line).groups()
        shape = tuple(int(s) for s in shape.split(',') if s)
        if dtype == 'int64':
            out[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        out[name] = _keyed(name, shape)
        if listing.startswith('gsa'):  # nothing else bounds an untrained one
            if re.search(r'\.rel_(row|col)$', name):
                out[name] *= 5 / math.sqrt(shape[1] * (shape[0] + 1) // 2)
            elif name.endswith('conv3_1x1.bn.weight'):
                out[name] *= .1
    return out


def keyed_images(H: int, W: int) -> torch.Tensor:
    """The images (2, 3, H, W) of the records, in float64."""
    def randn(name: str, *shape: int) -> torch.Tensor:
        seed = zlib.crc32(f'{name}{H}x{W}'.encode())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()

    coarse = randn('coarse', 2, 3, 8, 8)
    rows, columns = torch.arange(H) * 8 // H, torch.arange(W) * 8 // W
    return coarse[:, :, rows][:, :, :, columns] + .5 * randn('noise', 2, 3, H, W)
