"""What the mixers of a study have learned to look at: the weights of one pixel of one image, for each kept model."""
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

import timm
import torch

from .._extras import require
from .._images import DataError, normalise
from .._modes import evaluating
from ..inference.classifier import create_eval_transform, resolve_images
from ..layers import Mixer
from ..training.config import ImageValues
from ..training.data import load_splits
from .data import prepare
from .grid import TEST, Study
from .runner import Places

_HEADS = 4  # drawn of each mixer
_ROWS = 6  # mixers below each other


class Weights(NamedTuple):
    """The weights of one pixel of one map."""
    mixer: str
    heads: List[torch.Tensor]  # (h, w) of each


@torch.no_grad()
def look(model: torch.nn.Module, image: torch.Tensor, stage: int = 1) -> List[torch.Tensor]:
    """The weights of the middle pixel in the first block of a stage: (h, w) of each head, none where there are none.

    Args:
        model: A network of the study.
        image: (C, H, W), normalised.
        stage: Which, from 0.
    """
    module: Any = model
    mixer = module.layers[stage].blocks[0].attn
    found: List[torch.Tensor] = []

    def hook(mixer: Mixer, args: Any) -> None:
        weights = mixer.attention_map(args[0])
        if weights is not None:
            of_pixel = weights[0, weights.shape[1] // 2, weights.shape[2] // 2]  # heads, taps
            side = round(of_pixel.shape[-1] ** .5)
            if side ** 2 == of_pixel.shape[-1]:
                found.extend(of_pixel.unflatten(-1, (side, side)).float().cpu())

    handle = mixer.register_forward_pre_hook(hook)
    try:
        with evaluating(model):
            model(image.unsqueeze(0))
    finally:
        handle.remove()
    ghost: Optional[torch.Tensor] = getattr(mixer, 'ghost_add', None)
    if ghost is not None and found:  # filters of the first channel of each head, which the attention is added to
        per_head = ghost.shape[0] // len(found)
        found += [ghost[i * per_head].detach().float().cpu() for i in range(len(found))]
    return found


def draw(path: Path, places: Places, images: Path) -> Path:
    """Draw the weights of all mixers whose model was kept, for the first image that is tested on.

    Args:
        path: File of a study of images of classes.
        places: Where its models are.
        images: Folder to write to.

    Returns:
        The figure.

    Raises:
        DataError: No model was kept here.
    """
    study = Study(path)
    kept = {mixer: places.model(study, mixer) for mixer in study.settings.mixers}
    kept = {mixer: folder for mixer, folder in kept.items() if folder.is_dir()}
    if not kept:
        raise DataError(f'{places.work}: holds no models of {study.name}; they are kept where the study is run.')
    splits = load_splits(ImageValues(data=str(prepare(study.settings, places.work / 'data').folders[TEST])))
    rows, picture = [], None
    for mixer, folder in kept.items():
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        config = resolve_images(model)
        picture = splits.val.image(0)
        image = normalise(torch.as_tensor(create_eval_transform(config)(picture)), config['mean'], config['std'])
        weights = look(model, image)
        if weights:
            rows.append(Weights(mixer, weights[:_HEADS]))
    columns = -(-len(rows) // _ROWS)
    size = (1.3 * (1 + columns * _HEADS), .6 + 1.2 * min(_ROWS, len(rows)))
    figure = require('matplotlib.figure').Figure(figsize=size, layout='constrained')
    axes = figure.subplots(min(_ROWS, len(rows)), 1 + columns * _HEADS, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].imshow(picture)
    for number, row in enumerate(rows):
        column, line = divmod(number, _ROWS)
        first = 1 + column * _HEADS
        axes[line, first].set_title(row.mixer, fontsize=9, loc='left')
        for ax, weights in zip(axes[line, first:], row.heads):
            limit = weights.abs().max().item() or 1.
            ax.imshow(weights.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit)
    out = images / f'study_weights_{study.name}.png'
    figure.savefig(out, dpi=100, metadata={'Software': None})
    return out
