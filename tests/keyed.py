"""Weights and images that are a function of their names, and the records that belong to them (data/PROVENANCE.md)."""
import zlib

import torch
from helpers import DATA, assert_near
from timm import create_model


def randn(key, shape):
    """Standard normal numbers of a key."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))).double()


def keyed(key, shape):
    """The value of a parameter of that name in the authors' state dict."""
    x = randn(key, shape)
    if key.endswith('.bias'):
        return .1 * x
    if 'relative_position_bias' in key:
        return .5 * x
    return 1 + .1 * x if len(shape) == 1 else x / x[0].numel() ** .5


def keyed_state_dict(listing):
    """Weights for a file of names, shapes and dtypes; saved buffers, which no reader may use, are zeros."""
    out = {}
    for line in (DATA / listing).read_text().splitlines()[1:]:
        key, shape, dtype = line.split('\t')
        shape = tuple(int(s) for s in shape.split('x'))
        out[key] = keyed(key, shape) if dtype.startswith('float') else torch.zeros(shape, dtype=torch.int64)
    return out


def load(name, state_dict, **kwargs):
    """A model in float64 with weights that a checkpoint of whomever could hold."""
    overlay = dict(state_dict={'model': state_dict})
    return create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **kwargs).eval()


def check_record(record, logits, maps, tolerance):
    """Logits, and of the first image two tokens and the mean of each stage's map (B, C, H, W), are as recorded."""
    assert_near(logits, torch.from_numpy(record['logits']), tolerance)
    for i, x in enumerate(maps):
        x = x[:1].flatten(2).transpose(1, 2)
        rows = [0, x.shape[1] // 3]
        assert_near(x[:, rows], torch.from_numpy(record[f'stage{i}_tokens']), tolerance, f'stage {i}')
        assert_near(x.mean(1), torch.from_numpy(record[f'stage{i}_mean']), tolerance, f'stage {i}')
