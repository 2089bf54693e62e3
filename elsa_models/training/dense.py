"""What jobs of dense prediction share: the backbone of a recipe, and models saved with what builds them."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import safetensors.torch
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import ClassificationTask
from torch.utils.data import Dataset

from ..dense.features import DenseBackbone
from ..models._checkpoint import WeightsError
from .config import BaseRecipe, RecipeError, _value, weights_error
from .loading import EvalLoader
from .world import World

MODEL = 'model'
_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'


@dataclasses.dataclass
class DenseRecipe(BaseRecipe):
    """What recipes of detection and segmentation share."""
    data: str = _value('shapes', "'shapes' (circles, squares and triangles drawn on the fly), or a folder")
    train_images: int = _value(1000, 'shapes: number of images to train on', low=1)
    val_images: int = _value(100, 'shapes: number of images to hold out', low=1)
    size: int = _value(96, 'shapes: height and width in pixels', low=32)
    limit: int = _value(0, 'use at most this many images of each part, 0 for all', low=0)
    mean: Tuple[float, ...] = _value(IMAGENET_DEFAULT_MEAN, 'mean of each channel, of values between 0 and 1')
    std: Tuple[float, ...] = _value(IMAGENET_DEFAULT_STD, 'standard deviation of each channel')
    hflip: float = _value(0.5, 'probability of a horizontal flip', low=0., high=1.)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.name or Path(self.data).resolve().name or 'run'


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
    if ':' in recipe.model:
        raise RecipeError(f'model: got {recipe.model!r}, must be a name of timm; give weights in a file as checkpoint.')
    if len(recipe.mean) != 3 or len(recipe.std) != 3:
        raise RecipeError('mean, std: must be three numbers each.')
    if recipe.checkpoint is not None and not Path(recipe.checkpoint).is_file():
        raise RecipeError(f'checkpoint: got {recipe.checkpoint!r}, no such file.')
    try:
        return DenseBackbone(
            recipe.model, recipe.pretrained, recipe.checkpoint, recipe.warm_start, model_args=recipe.model_args)
    except WeightsError as e:
        if recipe.warm_start is not None:
            raise RecipeError(f'warm_start: {recipe.warm_start!r} is not possible. {e}') from e
        raise weights_error(e, recipe.pretrained, recipe.checkpoint) from e
    except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
        raise RecipeError(f'model: {recipe.model!r} with model_args {recipe.model_args} is not possible. {e}') from e


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


def save_model(model: nn.Module, folder: Union[str, Path], config: Dict[str, Any]) -> None:
    """Save weights as safetensors beside a config.json that says how to build the model.

    Args:
        model: Model to save.
        folder: Folder to create.
        config: What the model's builder takes, of plain values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    weights = {k: x.detach().cpu().contiguous() for k, x in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / _WEIGHTS, metadata=dict(format='pt'))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding='utf-8')


def load_model(
        folder: Union[str, Path],
        task: str,
        build: Callable[[Dict[str, Any]], nn.Module],
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Load what `save_model` has written.

    Args:
        folder: Folder of the model.
        task: What 'task' must be in its config.
        build: Makes the model from its config, without weights.

    Returns:
        The model in evaluation mode, on the CPU, and its config.

    Raises:
        WeightsError: There is no such model, it is of another task, or files do not fit each other.
    """
    folder = Path(folder)
    try:
        config: Optional[Dict[str, Any]] = json.loads((folder / _CONFIG).read_text(encoding='utf-8'))
        found = config.get('task')
    except (OSError, ValueError, AttributeError) as e:
        raise WeightsError(f'{folder}: has no readable {_CONFIG} ({e}).') from e
    if found != task:
        raise WeightsError(f'{folder}: is a model for {found!r}, must be for {task!r}.')
    try:
        model = build(config)
        model.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, safetensors.SafetensorError) as e:
        raise WeightsError(f'{folder}: cannot be loaded ({type(e).__name__}: {e}).') from e
    return model.eval(), config
