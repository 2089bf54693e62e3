"""List the models of this package: the table in the README, in markdown.

    elsa models
    elsa models 'focal_*'

Parameters and GMACs are computed (see elsa_models/inspect/macs.py for the convention). Accuracy is the papers' own, as
the families give it, on ImageNet-1k at the input size of the row.
"""
import argparse
import fnmatch
from typing import List, Optional, Tuple

import timm
import torch.nn as nn

from ..inspect import count_macs
from ..models import families, family_of

_COLUMNS = ('model', 'input', 'params (M), computed', 'GMACs, computed', 'top-1 (%), the paper\'s', 'weights')


def own_models() -> List[str]:
    """Names of this package's models, family by family."""
    return [name for family in families() for name in family.model_names]


def _num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _order(name: str) -> Tuple:
    """By family and size, those for tests at the end."""
    num_params = _num_params(timm.create_model(name, device='meta'))
    return name.startswith('test_'), families().index(family_of(name)), num_params, name


def _weights(name: str) -> str:
    cfg = timm.get_pretrained_cfg(name)
    if name.startswith('test_'):
        return '-'
    if cfg.hf_hub_id:
        return f'[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})'
    if cfg.notes:
        return cfg.notes[0]
    if not cfg.url:
        return 'none released'
    return f'[the authors\'{", on Google Drive" if "drive.google.com" in cfg.url else ""}]({cfg.url})'


def row(name: str) -> List[str]:
    """Cells of one model."""
    model = timm.create_model(name, device='meta')
    _, height, width = timm.get_pretrained_cfg(name).input_size
    published = family_of(name).top1.get(name)
    return [
        name,
        f'{height} x {width}',
        f'{_num_params(model) / 1e6:.3f}',
        f'{count_macs(model) / 1e9:.2f}',
        '-' if published is None else f'{published:.1f}',
        _weights(name),
    ]


def main(argv: Optional[List[str]] = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('models', nargs='*', default=['*'], help='names or wildcards, all models if none is given')
    args = parser.parse_args(argv)
    names = own_models()
    for pattern in args.models:
        if not fnmatch.filter(names, pattern):
            parser.error(f'no model is named {pattern!r}. There are: {", ".join(names)}')
    print('| ' + ' | '.join(_COLUMNS) + ' |')
    print('|---|---|--:|--:|--:|---|')
    for name in sorted([n for n in names if any(fnmatch.fnmatch(n, p) for p in args.models)], key=_order):
        print('| ' + ' | '.join(row(name)) + ' |')
    return 0
