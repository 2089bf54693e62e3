"""The README.md beside the weights of a model."""
from typing import Any, Dict, Optional

import timm
import torch.nn as nn

from ..inspect import count_macs
from ..models import family_of

UNKNOWN = 'unknown'  # licence
_NO_ACCURACY = 'No accuracy is stated: none was measured on this file.'

_NEEDS = 'import elsa_models  # from a clone of its repository: pip install . Without it timm does not know the model'
_CARD = '''---
library_name: timm
pipeline_tag: {task}
license: {license}
tags:
- {task}
- timm{tag}
---
```python
{needs}import timm

model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True)
```

# {name}

{summary}

| | |
|---|---|
| architecture | `{architecture}` |
| parameters, counted | {num_params:,} ({millions:.2f} M) |
| GMACs at {height} x {width}, counted | {gmacs:.2f} |
| image | {channels} x {height} x {width}, mean {mean}, std {std}, {interpolation}, crop {crop_pct} |
| classes | {classes} |
| {source} |
| model.safetensors | sha256 `{sha256}` |

{accuracy}

{paper}Code: elsa_models{origin}. Licence: {license}.
'''


def _paper(cfg: Dict[str, Any], architecture: str) -> str:
    """The line that names the paper; empty where none is known."""
    if not cfg.get('paper_name') and timm.is_model(architecture):  # left out of a config.json
        known = timm.get_pretrained_cfg(architecture)
        cfg = known.to_dict() if known is not None else {}
    name, number = cfg.get('paper_name'), (cfg.get('paper_ids') or '').removeprefix('arXiv:')
    if not name:
        return ''
    return f'Paper: [{name}](https://arxiv.org/abs/{number}).\n' if number else f'Paper: {name}.\n'


def model_card(
        model: nn.Module,
        name: str,
        summary: str,
        license: str,
        sha256: str,
        source: str,
        accuracy: str = _NO_ACCURACY,
        of_authors: bool = False,
        data_config: Optional[Dict[str, Any]] = None,
) -> str:
    """The README.md of a folder: how to load it, counted sizes, paper and licence, and what was measured.

    Args:
        model: The model that is saved.
        name: Of the model.
        summary: Where its weights are from, in sentences.
        license: Of the weights.
        sha256: Of model.safetensors.
        source: The table's row of where the weights are from, both its cells.
        accuracy: What was measured on which images, in sentences.
        of_authors: Whether the weights are those that the authors released.
        data_config: Preprocessing, as `timm.data.resolve_data_config` returns it; that of the model if None.
    """
    cfg = model.pretrained_cfg
    data_config = data_config or cfg
    channels, height, width = data_config['input_size']
    num_params = sum(p.numel() for p in model.parameters())
    family = family_of(cfg['architecture'])
    origin = f'; the authors\' is at {cfg["origin_url"]}' if of_authors and cfg.get('origin_url') else ''
    return _CARD.format(
        task='image-classification' if model.num_classes else 'image-feature-extraction',
        license=license,
        name=name,
        summary=summary,
        architecture=cfg['architecture'],
        tag=f'\n- {family.name}' if family is not None else '',
        needs=f'{_NEEDS}\n' if family is not None else '',
        paper=_paper(cfg, cfg['architecture']),
        num_params=num_params,
        millions=num_params / 1e6,
        gmacs=count_macs(model, (channels, height, width)) / 1e9,
        channels=channels,
        height=height,
        width=width,
        mean=tuple(data_config['mean']),
        std=tuple(data_config['std']),
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        classes=model.num_classes or 'none, features only',
        source=source,
        sha256=sha256,
        accuracy=accuracy,
        origin=origin,
    )
