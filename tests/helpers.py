"""What several test files share: weights in the authors' format, and measures of error."""
import ast
import re
import zlib
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

DATA = Path(__file__).parent / 'data'

_AUTHORS_NAMES = {'qkv': 'pre_proj', 'attn_conv': 'attn.0', 'attn_logits': 'attn.2', 'proj': 'post_proj'}
_DTYPES = {'float32': torch.float32, 'int64': torch.int64}


def authors_listing(size: str) -> List[Tuple[str, Tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every entry of the authors' state dict; size is tiny, small or base."""
    lines = (DATA / f'official_keys_{size}.txt').read_text().splitlines()
    rows = [line.split('\t') for line in lines]
    return [(name, ast.literal_eval(shape), _DTYPES[dtype]) for name, shape, dtype in rows]


def keyed_state_dict(size: str, seed: int = 0) -> Dict[str, torch.Tensor]:
    """Weights in the authors' format that depend only on their names (see data/PROVENANCE.md; seed 0 is the record)."""
    out = {}
    for name, shape, dtype in authors_listing(size):
        if not dtype.is_floating_point:
            out[name] = torch.zeros(shape, dtype=dtype)  # saved buffers, which no reader may use
            continue
        x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
        *_, parent, leaf = ['', *name.split('.')]
        if parent.startswith('norm') and leaf == 'weight':
            x = 1 + .1 * x
        elif leaf == 'bias':
            x = .05 * x
        elif leaf == 'rb':
            x = .5 * x
        elif leaf == 'ghost_head' or 'pre_proj' in name or '.attn.attn.' in '.' + name:
            x = .1 * x
        else:
            x = .04 * x
        out[name] = x
    return out


def drawn_picture(height: int, width: int) -> Image.Image:
    """Waves of three colours, different in every place."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 120 * np.sin(x / a) * np.cos(y / b) for a, b in ((3, 9), (7, 5), (11, 4))]
    return Image.fromarray(np.stack(waves, -1).round().astype(np.uint8))


def keyed_input() -> torch.Tensor:
    """The input of the record that belongs to `keyed_state_dict`, float32."""
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1234))


def to_authors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Write a state dict of ours as the authors would: the inverse of what the package reads."""
    out = {}
    for key, x in state_dict.items():
        block, _, leaf = key.partition('.attn.')
        local = block + '.attn.attn_conv.weight' in state_dict
        if leaf == 'ghost_mul':
            continue
        if leaf == 'ghost_add':
            mul = state_dict.get(block + '.attn.ghost_mul')
            out[block + '.attn.ghost_head'] = x[None] if mul is None else torch.stack([mul, x])[:, None]
            continue
        if leaf == 'relative_position_bias_table':
            out[block + '.attn.rb'] = x.flip(0).t().contiguous()
            out[block + '.attn.relative_id'] = torch.zeros(x.shape[0], dtype=torch.int64)
            continue
        if leaf.startswith('qkv.') and not local:
            q, k, v = x.chunk(3)
            x = torch.cat([v, q, k])
        elif leaf in ('qkv.weight', 'attn_logits.weight'):
            x = x[:, :, None, None]
        name, _, parameter = leaf.rpartition('.')
        if name in _AUTHORS_NAMES:
            key = f'{block}.attn.{_AUTHORS_NAMES[name]}.{parameter}'
        key = re.sub(r'^head\.fc\.', 'head.', key)
        key = re.sub(r'^layers\.(\d+)\.downsample', lambda m: f'layers.{int(m.group(1)) - 1}.downsample', key)
        out[key] = x
    return out


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, in float64; infinite where a value is not finite."""
    assert actual.shape == expected.shape, f'{tuple(actual.shape)} is not {tuple(expected.shape)}'
    if actual.numel() == 0:
        return 0.
    difference = (actual.detach().double() - expected.detach().double()).abs()
    return difference.nan_to_num(nan=float('inf')).max().item()


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared difference, in float64."""
    return (actual.detach().double() - expected.detach().double()).square().mean().sqrt().item()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = 'value') -> None:
    """Every entry is right to `tolerance` times the largest entry, or times one where all are smaller."""
    scale = max(1., expected.abs().max().item()) if expected.numel() else 1.
    error = max_error(actual, expected)
    assert error <= tolerance * scale, f'{name}: off by {error:.3g}, allowed {tolerance * scale:.3g}'


def learn_digits(model: torch.nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """Train a model of ten classes on four fifths of scikit-learn's digits, and return the accuracy on the others.

    Args:
        model: Of images of 32 x 32 pixels; it is left in evaluation mode.
        loss: Loss of images (B, 3, 32, 32) and labels (B,).
    """
    digits = pytest.importorskip('sklearn.datasets').load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 16 - .5  # 1797 images, 8 x 8
    x = F.interpolate(x, size=(32, 32), mode='bilinear', align_corners=False).expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target)
    held_out = torch.arange(len(y)) % 5 == 0
    x_train, y_train = x[~held_out], y[~held_out]
    epochs, batch = 25, 64
    steps = len(y_train) // batch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(y_train))[:steps * batch].split(batch):
            optimizer.zero_grad()
            loss(x_train[index], y_train[index]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(x[held_out]).argmax(dim=1) == y[held_out]).float().mean().item()
