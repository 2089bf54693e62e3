"""What jobs of dense prediction share: the backbone of a recipe, the task, and batches of evaluation."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import ClassificationTask
from torch.utils.data import Dataset

from ...dense.features import DenseBackbone
from ...models._checkpoint import WeightsError
from ...models._naming import ModelError, find_model
from ..config import BaseRecipe, RecipeError, name_of_data, value, weights_error
from ..loading import EvalLoader
from ..world import World

MODEL, PREDICTIONS = 'model', 'predictions.png'


@dataclasses.dataclass
class DenseRecipe(BaseRecipe):
    """What recipes of detection and segmentation share."""
    data: str = value('shapes', "'shapes' (circles, squares and triangles drawn on the fly), or a folder")
    train_images: int = value(1000, 'shapes: number of images to train on', low=1)
    val_images: int = value(100, 'shapes: number of images to hold out', low=1)
    size: int = value(96, 'shapes: height and width in pixels', low=32)
    limit: int = value(0, 'use at most this many images of each part, 0 for all', low=0)
    mean: Tuple[float, ...] = value(IMAGENET_DEFAULT_MEAN, 'mean of each channel, of values between 0 and 1')
    std: Tuple[float, ...] = value(IMAGENET_DEFAULT_STD, 'standard deviation of each channel')
    hflip: float = value(0.5, 'probability of a horizontal flip', low=0., high=1.)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.name or name_of_data(self.data)


def create_backbone(recipe: DenseRecipe) -> DenseBackbone:
    """The backbone of a recipe, with its first weights.

    Raises:
        RecipeError: timm does not know the model, it has other strides, its weights are not there, or a value is for
            classifiers alone.
    """
    if recipe.layer_decay is not None:
        raise RecipeError('layer_decay: must be none; it is for classifiers.')
    if recipe.fsdp:  # processes evaluate images of their own sizes, not all as many, and would wait for each other
        raise RecipeError('fsdp: must be false; it is for classifiers. grad_checkpointing takes less memory, too.')
    if len(recipe.mean) != 3 or len(recipe.std) != 3:
        raise RecipeError('mean, std: must be three numbers each.')
    if recipe.checkpoint is not None and not Path(recipe.checkpoint).is_file():
        raise RecipeError(f'checkpoint: got {recipe.checkpoint!r}, no such file.')
    name, model_args, checkpoint = _architecture(recipe)
    try:
        return DenseBackbone(
            name, recipe.pretrained and checkpoint is None, checkpoint, recipe.warm_start, model_args=model_args)
    except WeightsError as e:
        if recipe.warm_start is not None:
            raise RecipeError(f'warm_start: {recipe.warm_start!r} is not possible. {e}') from e
        raise weights_error(e, recipe.pretrained, recipe.checkpoint) from e
    except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
        raise RecipeError(f'model: {recipe.model!r} with model_args {recipe.model_args} is not possible. {e}') from e


def _architecture(recipe: DenseRecipe) -> Tuple[str, Dict[str, Any], Optional[str]]:
    """A name that timm knows, arguments, and a file of weights, of whatever a recipe names as its model.

    Raises:
        RecipeError: It is none of a classifier.
    """
    try:
        source = find_model(recipe.model)
        if source.path is None:
            return recipe.model, recipe.model_args, recipe.checkpoint
        if source.is_onnx:
            raise ModelError(f'model: got {recipe.model!r}, an ONNX file, which cannot be trained.')
    except ModelError as e:
        raise RecipeError(str(e)) from e
    name, model_args, weights = source.name, source.model_args, recipe.checkpoint or source.checkpoint
    if name.startswith('local-dir:'):  # what is saved has to do without that folder
        folder = Path(name.partition(':')[2])
        try:
            config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
            name, model_args = config['architecture'], {**config.get('model_args', {}), **model_args}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise RecipeError(f'model: {recipe.model!r} is no classifier that timm has saved ({e!r}).') from e
        weights = weights or folder / 'model.safetensors'
    model_args = {k: v for k, v in model_args.items() if k not in ('img_size', 'num_classes')}
    return name, {**model_args, **recipe.model_args}, str(weights)


def model_config(recipe: DenseRecipe, names: Tuple[str, ...]) -> Dict[str, Any]:
    """What builds a recipe's model again: its backbone and the values of these names."""
    model, model_args, _ = _architecture(recipe)
    return dict(model=model, model_args=model_args, **{name: getattr(recipe, name) for name in names})


class DenseTask(ClassificationTask):
    """A model and a function from it and a batch to the loss and its parts."""

    def __init__(self, model: nn.Module, loss: Callable[..., Dict[str, torch.Tensor]], device: torch.device) -> None:
        """
        Args:
            model: Model to be trained.
            loss: Called with the model, wrapped as it may be, and the batch.
            device: Device of the model.
        """
        super().__init__(model, criterion=nn.Identity(), device=device, verbose=False)
        self._loss = loss

    def forward(self, *batch: Any) -> Dict[str, torch.Tensor]:
        """Loss of a batch and its parts."""
        return self._loss(self.trainable_module, *batch)


def eval_batches(dataset: Dataset, world: World, missing: Any, workers: int) -> EvalLoader:
    """Single images of any size, shared among the processes; those that cannot be read are `missing`."""
    return EvalLoader(dataset, 1, world, missing=missing, workers=workers, collate=_only)


def _only(samples: List[Any]) -> Any:
    return samples[0]
