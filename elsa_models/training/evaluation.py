"""Classifying whole data sets, each image once over all processes, and statistics of batch norms from their images."""
import copy
from functools import partial
from typing import Any, Dict, List

import torch
import torch.nn as nn
from timm.data.loader import fast_collate
from torch.utils.data import Dataset, IterableDataset, Subset

from .._images import DataError
from ..inference.classifier import Predictions, create_eval_transform, normalised
from ..layers.batch_norm import reestimate_batch_norm
from .config import RecipeError
from .loading import EvalLoader
from .world import World


def create_eval_loader(
        dataset: Dataset,
        batch_size: int,
        world: World,
        data_config: Dict[str, Any],
        workers: int = 0,
        report: bool = True,
) -> EvalLoader:
    """A loader for `predict`.

    Args:
        dataset: Images as bytes (C, H, W), and classes.
        batch_size: Images of a batch.
        world: This process.
        data_config: Size, mean and std, as `timm.data.resolve_data_config` returns them.
        workers: Processes that load.
        report: Warn of each image that cannot be read, once.
    """
    return EvalLoader(
        dataset,
        batch_size,
        world,
        missing=(torch.zeros(data_config['input_size'], dtype=torch.uint8), -1),
        workers=workers,
        collate=fast_collate,
        wrap=partial(normalised, data_config=data_config, device=world.device),
        report=report,
    )


def predict(model: Any, loader: EvalLoader, world: World) -> Predictions:
    """Classify all images of a loader; all processes take part and get the same.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes).
        loader: Batches of images and classes; class -1 for images that are to be left out.
        world: This process.

    Raises:
        DataError: There are no images.
    """
    columns: List[List[torch.Tensor]] = [[], [], [], [], []]
    for images, targets in loader:
        logits = model(images).double()
        probabilities = logits.softmax(dim=-1)
        confidence, predicted = probabilities.max(dim=-1)
        top5 = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        loss = nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction='none')
        in_top5 = (top5 == targets[:, None]).any(dim=-1)
        for column, x in zip(columns, (targets, predicted, confidence, loss, in_top5)):
            column.append(x.cpu())
    mine = [torch.cat(column)[:loader.num_valid] for column in columns] if columns[0] else None
    parts = [part for part in world.gather(mine) if part is not None]
    if not parts:
        raise DataError('there are no images to evaluate on.')
    merged = [loader.merge([part[i] for part in parts]) for i in range(len(columns))]
    index = (merged[0] >= 0).nonzero().flatten()
    if not len(index):
        raise DataError('none of the images to evaluate on can be read.')
    return Predictions(*(x[index] for x in merged), index)


def reestimate(
        model: nn.Module,
        images: Dataset,
        number: int,
        batch_size: int,
        world: World,
        data_config: Dict[str, Any],
        workers: int = 0,
        report: bool = True,
) -> None:
    """Find the statistics of a model's batch norms anew, on images drawn from those to train on.

    Every process takes the same images, and gets the same statistics. See `elsa_models.reestimate_batch_norm`.

    Args:
        model: On the device of the process.
        images: Those to train on; their transform stays.
        number: How many to take; of more than one batch, whole batches.
        batch_size: Images of a batch.
        world: This process.
        data_config: As in `create_eval_loader`.
        workers: Processes that load.
        report: Warn of each image that cannot be read; not where the same images are read again.

    Raises:
        RecipeError: The images are a stream, or the model has no batch norm.
    """
    if isinstance(images, IterableDataset):
        raise RecipeError('reestimate: images that come as a stream cannot be drawn from; must be 0.')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:number]
    if len(order) > batch_size:
        order = order[:len(order) // batch_size * batch_size]  # batches count alike
    images = copy.copy(images)
    images.transform = create_eval_transform(data_config)
    loader = create_eval_loader(
        Subset(images, order.tolist()), batch_size, World(world.device), data_config, workers, report)
    try:
        reestimate_batch_norm(model, (batch[targets >= 0] for batch, targets in loader))
    except ValueError as e:
        raise RecipeError(f'reestimate: {e}') from e
