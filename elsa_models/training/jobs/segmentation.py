"""Segmenters: data, loss and evaluation of semantic segmentation."""
import dataclasses
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..._images import DataError, denormalise, draw, normalise
from ...dense.draw import contact_sheet, overlay
from ...dense.label_maps import LabelMapSplits, load_label_maps
from ...dense.metrics import IGNORE, confusion, segmentation_metrics
from ...dense.saved import save_model
from ...dense.segmentation import TASK, Segmenter, build_segmenter, predict_labels, segmentation_loss
from ..config import RecipeError, value
from ..job import Job
from ..loading import TrainLoader
from ..world import World
from .dense import MODEL, PREDICTIONS, DenseRecipe, DenseTask, create_backbone, eval_batches, model_config

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class SegmentationRecipe(DenseRecipe):
    """The recipe of a segmenter."""
    num_classes: Optional[int] = value(None, 'number of classes; that of classes.txt in the folder of the data if'
                                             ' none', low=2)
    # model
    decoder: str = value('upernet', 'architecture of segmentation_models_pytorch')
    decoder_args: Dict[str, Any] = value({}, 'its further arguments: decoder_channels, ...')
    aux_channels: int = value(256, 'channels of the auxiliary head, 0 for none', low=0)
    aux_weight: float = value(0.4, 'weight of its loss', low=0.)
    # images
    crop_size: int = value(96, 'height and width that is cut out in training, in pixels', low=32)
    short_sides: Tuple[int, int] = value((72, 144), 'range of the shorter side in training, before the crop', low=16)
    photometric: bool = value(True, 'change brightness, contrast, saturation and hue at random')
    eval_short_side: int = value(0, 'shorter side in evaluation, 0 leaves images as they are', low=0)
    eval_window: int = value(0, 'look at windows of so many pixels in evaluation, 0 for whole images', low=0)
    eval_scales: Tuple[float, ...] = value((1.,), 'sizes at which images are looked at in evaluation', low=0.1)
    eval_flip: bool = value(False, 'look at mirror images, too')


def train_transform(recipe: SegmentationRecipe) -> v2.Transform:
    """Resize, cut out, mirror and recolour an image and its labels alike."""
    steps = [
        v2.RandomResize(recipe.short_sides[0], recipe.short_sides[1] + 1),
        v2.RandomCrop(
            recipe.crop_size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE, 'others': 0}),
        v2.RandomHorizontalFlip(recipe.hflip),
    ]
    return v2.Compose([*steps, v2.RandomPhotometricDistort()] if recipe.photometric else steps)


class SegmentationJob(Job):
    """Trains a segmenter as a `SegmentationRecipe` says."""
    metric = 'miou'
    in_percent = ('miou', 'macc', 'pixel_acc')
    recipe_kind = SegmentationRecipe
    outputs = (MODEL, PREDICTIONS)

    @classmethod
    def requirements(cls, recipe: SegmentationRecipe) -> List[Tuple[str, str]]:
        """Packages beyond the core that a recipe needs."""
        return [('segmentation_models_pytorch', 'segmentation')]

    @staticmethod
    def load(recipe: SegmentationRecipe) -> LabelMapSplits:
        """The images to train on and those to hold out, see `load_label_maps`."""
        return load_label_maps(
            recipe.data, (recipe.train_images, recipe.val_images), recipe.size, recipe.limit, recipe.num_classes)

    def __init__(self, recipe: SegmentationRecipe, world: World) -> None:
        """
        Raises:
            RecipeError: A value of the recipe cannot be used.
            DataError: The data cannot be used.
        """
        self.recipe, self.world = recipe, world
        self.splits = self.load(recipe)
        if recipe.short_sides[0] > recipe.short_sides[1]:
            raise RecipeError(f'short_sides: got {recipe.short_sides}, must be the lower and the upper end.')
        self.splits.train.transform = train_transform(recipe)
        try:
            model = Segmenter(
                create_backbone(recipe), len(self.splits.class_names), recipe.decoder, recipe.decoder_args,
                recipe.aux_channels)
        except ValueError as e:
            raise e if isinstance(e, RecipeError) else RecipeError(str(e)) from e
        if world.size > 1 and world.device.type == 'cuda':
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.train_loader = TrainLoader(
            self.splits.train, recipe.batch_size, world, recipe.seed, recipe.accumulate, recipe.workers,
            min_steps=recipe.steps_per_epoch)
        if self.train_loader.batch_size // (world.size * recipe.accumulate) < 2:
            raise RecipeError('batch_size: must leave two images to each process and part, for batch normalisation.')
        missing = (torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((32, 32), IGNORE))
        self._eval_loader = eval_batches(self.splits.val, world, missing, recipe.workers)
        self.task = DenseTask(model.to(world.device), self._loss, world.device)
        self.config = model_config(recipe, (
            'decoder', 'decoder_args', 'aux_channels', 'mean', 'std', 'eval_short_side', 'eval_window', 'eval_scales',
            'eval_flip'))
        self.config.update(task=TASK, class_names=self.splits.class_names)
        if world.is_main:
            _logger.info(
                '%s: %d images of %d classes to train on, %d held out; %s on %s, %.2f M parameters', recipe.data,
                self.train_loader.num_images, len(self.splits.class_names), len(self.splits.val), recipe.decoder,
                recipe.model, sum(p.numel() for p in model.parameters()) / 1e6)

    def _loss(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Dict[str, torch.Tensor]:
        return dict(loss=segmentation_loss(model(images), labels, self.recipe.aux_weight))

    def prepare(self, batch: Any, epoch: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images, normalised, and labels, on the device."""
        images, labels = (x.to(self.world.device, non_blocking=True) for x in batch)
        return normalise(images, self.recipe.mean, self.recipe.std), labels

    def preview(self, args: Tuple[Any, ...]) -> torch.Tensor:
        """The images as the model is given them."""
        return denormalise(args[0], self.recipe.mean, self.recipe.std)

    def head(self) -> Tuple[str, ...]:
        """All but the backbone."""
        return ('net.decoder', 'net.segmentation_head', *(('aux_head',) if self.recipe.aux_channels else ()))

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        """Mean intersection over union and accuracies of the held-out images, in percent.

        Raises:
            DataError: No pixel has a class.
        """
        num_classes = len(self.splits.class_names)
        total = torch.zeros(num_classes, num_classes, dtype=torch.long)
        for _, (image, labels) in zip(self._eval_loader.indices, self._eval_loader):
            predicted = predict_labels(model, image.to(self.world.device), self.config)
            total += confusion(predicted.cpu(), labels, num_classes)
        total = sum(self.world.gather(total))
        if not total.any():
            raise DataError('none of the images to evaluate on can be read, or none has a pixel of any class.')
        return segmentation_metrics(total)

    def whole_model(self) -> nn.Module:
        """A model as that of the recipe, without weights."""
        return build_segmenter(self.config).to(self.world.device)

    def finish(self, model: nn.Module, folder: Path, history: List[Dict[str, float]]) -> None:
        """Save the model, and what it says of some held-out images."""
        save_model(model, folder / MODEL, self.config)
        draw(PREDICTIONS, self._draw, model, folder / PREDICTIONS)

    def _draw(self, model: nn.Module, path: Path) -> None:
        rows, seen = [], set()
        with torch.no_grad():
            for i in range(min(8, len(self.splits.val))):
                try:
                    image, labels = self.splits.val.read(i)
                except (OSError, DataError):
                    continue
                x = v2.functional.pil_to_tensor(image).to(self.world.device)
                predicted = predict_labels(model, x, self.config).cpu().numpy()
                seen |= {*labels.flat, *predicted.flat} - {IGNORE}
                rows.append([image, overlay(image, labels), overlay(image, predicted)])
        if rows:
            names = {int(k): self.splits.class_names[k] for k in sorted(seen)}
            contact_sheet(rows, ('image', 'labelled', 'found'), names).save(path)
