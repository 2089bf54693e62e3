"""Resizing and cropping as products with constant matrices, which every runtime computes alike."""
import math
from typing import Any, Dict, Tuple

import numpy as np
import torch
from PIL import Image


def resize_matrices(
        from_size: Tuple[int, int],
        size: Tuple[int, int],
        data_config: Dict[str, Any],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What timm's transform of evaluation makes of pictures of one size: `rows @ picture @ columns.T + margin`.

    The weights are Pillow's, which rounds to bytes twice where these do not.

    Args:
        from_size: Height H and width W of the pictures.
        size: Height h and width w of what the model takes.
        data_config: With interpolation, crop_pct, crop_mode and mean, as `timm.data.resolve_data_config` returns it.

    Returns:
        rows (h, H); columns (w, W); margin (h, w, C), the bytes where the resized picture does not reach.
    """
    scaled = _resized_size(from_size, size, data_config)
    resample = Image.Resampling[data_config['interpolation'].upper()]
    rows, columns = (_matrix(*sides, resample) for sides in zip(from_size, scaled, size, strict=True))
    covered = rows.sum(1).round()[:, None, None] * columns.sum(1).round()[:, None]
    border = data_config['crop_mode'] == 'border'
    fill = torch.tensor([float(round(255 * v)) if border else 0. for v in data_config['mean']])
    return rows, columns, (1. - covered) * fill


def _resized_size(from_size: Tuple[int, int], size: Tuple[int, int], data_config: Dict[str, Any]) -> Tuple[int, int]:
    """Height and width before the middle is cut out: timm.data.transforms_factory.transforms_imagenet_eval."""
    H, W = from_size
    h, w = (math.floor(side / data_config['crop_pct']) for side in size)
    mode = data_config['crop_mode']
    if mode == 'squash':
        return h, w
    if mode != 'border' and h == w:
        return (h, int(w * W / H)) if H < W else (int(h * H / W), w)
    ratio = (max if mode == 'border' else min)(H / h, W / w)
    return round(H / ratio), round(W / ratio)


def _matrix(from_side: int, scaled: int, side: int, resample: Image.Resampling) -> torch.Tensor:
    """The weights (side, from_side) of a line, resized to `scaled` pixels and cropped to its middle, or padded."""
    identity = Image.fromarray(np.eye(from_side, dtype=np.float32))
    weights = torch.from_numpy(np.array(identity.resize((from_side, scaled), resample)))
    if scaled >= side:
        start = round((scaled - side) / 2)
        return weights[start:start + side].contiguous()
    out = weights.new_zeros(side, from_side)
    start = (side - scaled) // 2
    out[start:start + scaled] = weights
    return out
