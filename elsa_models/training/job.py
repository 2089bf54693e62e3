"""What a run trains: the one thing that classification, detection and segmentation do not share."""
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
import torch.nn as nn
from timm.task.task import TrainingTask
from timm.utils import unwrap_model

from .config import BaseRecipe
from .loading import TrainLoader
from .world import World


class Job(ABC):
    """Data, model and loss, evaluation, and the results of a run.

    `run_job` makes one in every process, the `Trainer` trains its `task` on its `train_loader`, and brings optimiser,
    schedule, precision, moving average, processes, checkpoints, bars and logs. A job draws random numbers from the
    global generators of Python, NumPy and torch alone, which are seeded for every step.

    Attributes:
        task: timm's training task: `task(*args)` of what `prepare` returns gives a dictionary with the 'loss', a mean
            over the batch, and other scalars to be logged; everything else in it is ignored. Its `trainable_module` is
            the model, or a module that holds it as `module`.
        train_loader: Batches of training.
        metric: Which entry of `evaluate` says what epoch is the best.
        higher_is_better: Whether more of it is better.
        outputs: Names of all files and folders that `finish` may write.
        recipe_kind: Class of its recipes.
        in_percent: How the names of the metrics start that are percentages.
    """
    task: TrainingTask
    train_loader: TrainLoader
    metric: str
    higher_is_better: bool = True
    outputs: Tuple[str, ...] = ()
    recipe_kind: Type[BaseRecipe] = BaseRecipe
    in_percent: Tuple[str, ...] = ()

    @classmethod
    def requirements(cls, recipe: BaseRecipe) -> List[Tuple[str, str]]:
        """Packages beyond the core that a recipe needs: pairs of module and extra. Checked before anything is done."""
        return []

    @abstractmethod
    def __init__(self, recipe: BaseRecipe, world: World) -> None:
        """
        Args:
            recipe: Says everything.
            world: This process.
        """

    @property
    def model(self) -> nn.Module:
        """The model itself, without wrappers."""
        return unwrap_model(self.task.get_trainable_module())

    def prepare(self, batch: Any, epoch: int) -> Tuple[Any, ...]:
        """Arguments of the task from a batch of the loader: on the device, mixed, erased.

        Args:
            batch: One of the loader's.
            epoch: Number of the epoch, from 0.
        """
        return tuple(batch)

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        """Metrics of all held-out images, the same in every process.

        Args:
            model: Model in evaluation mode: the trained one or its moving average. Gradients are off, autocast is on.
        """

    @classmethod
    def show(cls, metrics: Dict[str, float]) -> str:
        """Metrics for a person, by name and with percent signs."""
        return ', '.join(
            f'{name} {value:.2f} %' if name.startswith(cls.in_percent or '-') else f'{name} {value:.4g}'
            for name, value in metrics.items())

    def head(self) -> Tuple[str, ...]:
        """Names of the modules that are trained alone in `head_epochs`."""
        head = self.model.default_cfg.get('classifier', ())
        return (head,) if isinstance(head, str) else tuple(head)

    def preview(self, args: Tuple[Any, ...]) -> Optional[torch.Tensor]:
        """Images (N, C, H, W) between 0 and 1 that show what the model is fed with, or None.

        Args:
            args: What `prepare` has returned.
        """
        return None

    @abstractmethod
    def whole_model(self) -> nn.Module:
        """A model of the same architecture, whole and on this process's device; its weights do not matter."""

    @abstractmethod
    def finish(self, model: nn.Module, folder: Path, history: List[Dict[str, float]]) -> None:
        """Write the results. Called in the main process alone.

        Args:
            model: Model in evaluation mode with the best weights, whole.
            folder: Folder to write to; what an earlier attempt has left is gone.
            history: The metrics of each epoch, as in the log.
        """
