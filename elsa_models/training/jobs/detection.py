"""Detectors: data, loss and evaluation of object detection and instance segmentation."""
import dataclasses
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from pycocotools.coco import COCO
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vf

from ..._images import DataError, draw
from ...dense.coco import ObjectImages, average_precision, load_objects, to_coco
from ...dense.detection import DETECTORS, TASK, build_detector, check_targets, detect, losses_of
from ...dense.draw import contact_sheet, draw_objects
from ...dense.saved import save_model
from ..config import RecipeError, value
from ..job import Job
from ..loading import TrainLoader
from ..world import World
from .dense import MODEL, PREDICTIONS, DenseRecipe, DenseTask, create_backbone, eval_batches, model_config

_logger = logging.getLogger(__name__)

_SHOWN = 0.5  # lowest score in the picture of predictions


@dataclasses.dataclass
class DetectionRecipe(DenseRecipe):
    """The recipe of a detector."""
    # model
    detector: str = value('mask_rcnn', 'what finds objects on the maps of the backbone', choices=DETECTORS)
    detector_args: Dict[str, Any] = value({}, "further arguments of torchvision's class, as box_nms_thresh")
    anchor_sizes: Tuple[int, ...] = value((32, 64, 128, 256, 512), 'side of the anchors of each map, in pixels', low=1)
    fpn_channels: int = value(256, 'channels of the pyramid and the convolutions of all heads', low=8)
    head_channels: int = value(1024, 'channels of the linear layers of the box heads', low=8)
    # images
    skip_empty: bool = value(False, 'leave out images without objects in training')
    short_sides: Tuple[int, ...] = value((96,), 'shorter sides in training, of which one is drawn', low=32)
    max_side: int = value(1333, 'largest longer side in training and evaluation', low=32)
    crop_prob: float = value(0., 'probability that a part is cut out in training and resized', low=0., high=1.)
    crop_short_sides: Tuple[int, ...] = value((400, 500, 600), 'shorter sides before that', low=32)
    crop_range: Tuple[int, int] = value((384, 600), 'range of its height and width', low=16)
    eval_short_side: int = value(96, 'shorter side in evaluation', low=32)


class RandomRangeCrop(v2.Transform):
    """Cut out a part whose height and width are each drawn from a range, or all where an image is smaller."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: List[Any]) -> Dict[str, Any]:
        """Draw a part."""
        sides = []
        for size in v2.query_size(flat_inputs):
            side = int(torch.randint(min(size, self.low), min(size, self.high) + 1, ()))
            sides.append((int(torch.randint(size - side + 1, ())), side))
        (top, height), (left, width) = sides
        return dict(top=top, left=left, height=height, width=width)

    def transform(self, inpt: Any, params: Dict[str, Any]) -> Any:
        """Cut it out."""
        return self._call_kernel(vf.crop, inpt, **params)


def train_transform(recipe: DetectionRecipe) -> v2.Transform:
    """Mirror, cut out and resize an image with its boxes and masks; boxes of less than a pixel are dropped."""
    resize = v2.RandomShortestSize(list(recipe.short_sides), max_size=recipe.max_side)
    steps = [v2.RandomHorizontalFlip(recipe.hflip)]
    if recipe.crop_prob:
        cut = v2.Compose([
            v2.RandomShortestSize(list(recipe.crop_short_sides)), RandomRangeCrop(*recipe.crop_range), resize])
        steps.append(v2.RandomChoice([cut, resize], p=[recipe.crop_prob, 1. - recipe.crop_prob]))
    else:
        steps.append(resize)
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.)])


def _collate(samples: List[Any]) -> Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]]:
    images, targets = zip(*samples)
    return list(images), list(targets)


class DetectionJob(Job):
    """Trains a detector as a `DetectionRecipe` says."""
    metric = 'box_ap'
    in_percent = ('box_', 'mask_')
    recipe_kind = DetectionRecipe
    outputs = (MODEL, PREDICTIONS)

    @classmethod
    def requirements(cls, recipe: DetectionRecipe) -> List[Tuple[str, str]]:
        """Packages beyond the core that a recipe needs."""
        return [('pycocotools', 'detection')]

    @staticmethod
    def load(recipe: DetectionRecipe) -> Tuple[ObjectImages, ObjectImages]:
        """The images to train on and those to hold out, see `load_objects`."""
        train, val = load_objects(
            recipe.data, (recipe.train_images, recipe.val_images), recipe.size, recipe.limit,
            need_masks=recipe.detector != 'retinanet')
        if recipe.skip_empty:
            train.skip_empty()
            if not len(train):
                raise DataError(f'{recipe.data}: there are no images with objects to train on.')
        return train, val

    def __init__(self, recipe: DetectionRecipe, world: World) -> None:
        """
        Raises:
            RecipeError: A value of the recipe cannot be used.
            DataError: The data cannot be used.
        """
        self.recipe, self.world = recipe, world
        self.train_images, self.val_images = self.load(recipe)
        self.class_names = self.train_images.class_names
        if recipe.crop_range[0] > recipe.crop_range[1]:
            raise RecipeError(f'crop_range: got {recipe.crop_range}, must be the lower and the upper end.')
        self.train_images.transform = train_transform(recipe)
        self.config = model_config(recipe, (
            'detector', 'detector_args', 'anchor_sizes', 'fpn_channels', 'head_channels', 'eval_short_side', 'max_side',
            'mean', 'std'))
        self.config.update(task=TASK, class_names=self.class_names)
        backbone = create_backbone(recipe)
        try:
            model = build_detector(self.config, backbone)
        except ValueError as e:
            raise RecipeError(str(e)) from e
        if world.size > 1 and world.device.type == 'cuda':
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.train_loader = TrainLoader(
            self.train_images, recipe.batch_size, world, recipe.seed, recipe.accumulate, recipe.workers,
            collate=_collate, min_steps=recipe.steps_per_epoch)
        self._eval_loader = eval_batches(self.val_images, world, (None, None), recipe.workers)
        self._truth: Optional[COCO] = None
        self.task = DenseTask(model.to(world.device), losses_of, world.device)
        if world.is_main:
            _logger.info(
                '%s: %d images of %d classes to train on, %d held out; %s on %s, %.2f M parameters', recipe.data,
                len(self.train_images), len(self.class_names), len(self.val_images), recipe.detector, recipe.model,
                sum(p.numel() for p in model.parameters()) / 1e6)

    def prepare(self, batch: Any, epoch: int) -> Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]]:
        """Images between 0 and 1 and targets, on the device."""
        device = self.world.device
        images = [x.to(device, non_blocking=True).float() / 255. for x in batch[0]]
        targets = [{k: x.to(device, non_blocking=True) for k, x in t.items()} for t in batch[1]]
        check_targets(images, targets, len(self.class_names))
        return images, targets

    def head(self) -> Tuple[str, ...]:
        """All but the backbone."""
        return ('backbone.fpn', *(('head',) if self.recipe.detector == 'retinanet' else ('rpn', 'roi_heads')))

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        """AP, AP50 and AP75 of boxes and, where there are any, masks, in percent."""
        results, seen = [], []
        for index, (image, _) in zip(self._eval_loader.indices, self._eval_loader):
            if image is None:  # not readable
                continue
            found, = model([image.to(self.world.device).float() / 255.])
            seen.append(self.val_images.image_ids[index])
            results += to_coco(found, seen[-1], self.val_images.category_ids)
        parts = self.world.gather((results, seen))
        metrics = None
        if self.world.is_main:
            results, seen = (sum((part[k] for part in parts), []) for k in (0, 1))
            if self._truth is None:
                self._truth = self.val_images.ground_truth()
            metrics = dict(images=float(len(seen)))
            for name, kind in (('box', 'bbox'), ('mask', 'segm'))[:1 if self.recipe.detector == 'retinanet' else 2]:
                values = average_precision(self._truth, results, seen, kind)
                metrics.update((f'{name}_{k}', v) for k, v in values.items())
        return self.world.share(metrics)

    def whole_model(self) -> nn.Module:
        """A model as that of the recipe, without weights."""
        return build_detector(self.config).to(self.world.device)

    def finish(self, model: nn.Module, folder: Path, history: List[Dict[str, float]]) -> None:
        """Save the model, and what it finds on some held-out images."""
        save_model(model, folder / MODEL, self.config)
        draw(PREDICTIONS, self._draw, model, folder / PREDICTIONS)

    def _draw(self, model: nn.Module, path: Path) -> None:
        rows = []
        for i in range(min(8, len(self.val_images))):
            try:
                found = self.val_images.read(i)
            except (OSError, DataError):
                continue
            truth = dict(
                boxes=torch.from_numpy(found.boxes), labels=torch.from_numpy(found.labels),
                masks=torch.from_numpy(found.masks)[:, None])
            predicted = detect(model, found.image, _SHOWN)
            rows.append([found.image, draw_objects(found.image, truth, self.class_names),
                         draw_objects(found.image, predicted, self.class_names)])
        if rows:
            headings = ('image', 'annotated', f'found, scores from {_SHOWN}')
            contact_sheet(rows, headings, dict(enumerate(self.class_names, 1))).save(path)


