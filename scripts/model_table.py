"""Print the table of models in the README, in markdown.

Sizes come from the registry, parameters and GMACs are computed (see elsa_models/macs.py for the convention). Accuracy
is the paper's own, on ImageNet-1k at the input size of the row.
"""
import argparse
import fnmatch
from typing import List, Optional, Tuple

import timm

import elsa_models  # noqa: F401  registers the models
from elsa_models.inspect import count_macs

# top-1 at the input size of the name; of ELSA-VOLO, only these two were published
_PUBLISHED = {
    'elsa_swin_tiny': 82.7,
    'elsa_swin_small': 83.5,
    'elsa_swin_base': 84.0,
    'elsa_volo_d1_224': 84.7,
    'elsa_volo_d5_512': 87.2,
}
_SIZES = ('tiny', 'small', 'base')
_COLUMNS = ('model', 'input', 'params (M), computed', 'GMACs, computed', 'top-1 (%), the paper\'s', 'weights')


def own_models() -> List[str]:
    """Names of this package's models: by family and size, those for tests at the end."""
    def key(name: str) -> Tuple:
        size = name.rpartition('_')[2]
        return name.startswith('test_'), 'volo' in name, _SIZES.index(size) if size in _SIZES else 0, name

    names = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('elsa_models.')]
    return sorted(names, key=key)


def _weights(name: str) -> str:
    cfg = timm.get_pretrained_cfg(name)
    if name.startswith('test_'):
        return '-'
    if cfg.hf_hub_id:
        return f'[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})'
    if 'volo' in name:
        return 'none released'
    return f"[the authors', on Google Drive]({cfg.url})"


def row(name: str) -> List[str]:
    """Cells of one model."""
    model = timm.create_model(name, device='meta')
    _, height, width = timm.get_pretrained_cfg(name).input_size
    num_params = sum(p.numel() for p in model.parameters())
    published = _PUBLISHED.get(name)
    return [
        name,
        f'{height} x {width}',
        f'{num_params / 1e6:.3f}',
        f'{count_macs(model) / 1e9:.2f}',
        '-' if published is None else f'{published:.1f}',
        _weights(name),
    ]


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('models', nargs='*', default=['*'], help='names or wildcards, all models if none is given')
    args = parser.parse_args(argv)
    names = own_models()
    for pattern in args.models:
        if not fnmatch.filter(names, pattern):
            parser.error(f'no model is named {pattern!r}. There are: {", ".join(names)}')
    print('| ' + ' | '.join(_COLUMNS) + ' |')
    print('|---|---|--:|--:|--:|---|')
    for name in names:
        if any(fnmatch.fnmatch(name, p) for p in args.models):
            print('| ' + ' | '.join(row(name)) + ' |')


if __name__ == '__main__':
    main()
