"""Segmenters: data, loss and evaluation of semantic segmentation."""
import dataclasses
import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from ..dense.draw import contact_sheet, overlay
from ..dense.features import DenseBackbone
from ..dense.segmentation import IGNORE, Segmenter, confusion, segment, segmentation_loss, segmentation_metrics
from ..dense.shapes import CLASSES, Shapes
from .config import RecipeError, _value
from .data import decode
from .dense import MODEL, DenseRecipe, DenseTask, create_backbone, eval_batches, load_model, save_model
from .job import Job
from .loading import DataError, TrainLoader
from .world import World

_logger = logging.getLogger(__name__)

TASK = 'semantic-segmentation'
PREDICTIONS = 'predictions.png'
_LAYOUTS = (  # folders of images and of labels, to train on and to hold out; whether label 0 is none
    (('images/training', 'annotations/training'), ('images/validation', 'annotations/validation'), True),  # ADE20K
    (('images/train', 'masks/train'), ('images/val', 'masks/val'), False),
)


@dataclasses.dataclass
class SegmentationRecipe(DenseRecipe):
    """The recipe of a segmenter."""
    num_classes: Optional[int] = _value(None, 'number of classes; that of classes.txt in the folder of the data if'
                                              ' none', low=2)
    # model
    decoder: str = _value('upernet', 'architecture of segmentation_models_pytorch')
    decoder_args: Dict[str, Any] = _value({}, 'its further arguments: decoder_channels, ...')
    aux_channels: int = _value(256, 'channels of the auxiliary head, 0 for none', low=0)
    aux_weight: float = _value(0.4, 'weight of its loss', low=0.)
    # images
    crop_size: int = _value(96, 'height and width that is cut out in training, in pixels', low=32)
    short_sides: Tuple[int, int] = _value((72, 144), 'range of the shorter side in training, before the crop', low=16)
    photometric: bool = _value(True, 'change brightness, contrast, saturation and hue at random')
    eval_short_side: int = _value(0, 'shorter side in evaluation, 0 leaves images as they are', low=0)
    eval_window: int = _value(0, 'look at windows of so many pixels in evaluation, 0 for whole images', low=0)
    eval_scales: Tuple[float, ...] = _value((1.,), 'sizes at which images are looked at in evaluation', low=0.1)
    eval_flip: bool = _value(False, 'look at mirror images, too')


class LabelMaps(Dataset):
    """Images and label maps: files, or scenes of `Shapes`.

    `transform` maps an image (3, H, W), uint8, and labels (H, W), int64, to the same of other sizes; None leaves them.
    """

    def __init__(
            self,
            source: Union[Shapes, Sequence[Tuple[Path, Path]]],
            num_classes: int,
            zero_is_none: bool = False,
    ) -> None:
        """
        Args:
            source: Scenes, or files of images and label maps.
            num_classes: Classes that may be in a label map, beside 255 for none.
            zero_is_none: Labels are one more than classes, and 0 is none.
        """
        self.source, self.num_classes, self.zero_is_none = source, num_classes, zero_is_none
        self.transform: Optional[v2.Transform] = None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tuple[Image.Image, np.ndarray]:
        """An image, and its labels (H, W), int64.

        Raises:
            DataError: A file cannot be read, is of another size than its image, or holds an unknown class.
        """
        if isinstance(self.source, Shapes):
            scene = self.source[index]
            labels = np.zeros((self.source.size,) * 2, dtype=np.int64)
            for mask, label in zip(scene.masks, scene.labels):
                labels[mask] = label + 1
            return scene.image, labels
        file, label_file = self.source[index]
        image = decode(file, 'RGB', file)
        try:
            with Image.open(label_file) as opened:
                labels = np.array(ImageOps.exif_transpose(opened))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(f'{label_file}: cannot be read as a label map ({e}).') from e
        if labels.ndim != 2 or labels.dtype.kind not in 'ui':
            raise DataError(f'{label_file}: must have one channel of whole numbers, the classes.')
        if labels.shape != image.size[::-1]:
            raise DataError(
                f'{label_file}: is of {labels.shape[1]} x {labels.shape[0]} pixels, its image of {image.width} x'
                f' {image.height}.')
        labels = labels.astype(np.int64)
        if self.zero_is_none:
            labels = np.where(labels == 0, IGNORE, labels - 1)
        strange = labels[(labels != IGNORE) & ((labels >= self.num_classes) | (labels < 0))]
        if strange.size:
            raise DataError(
                f'{label_file}: has class {strange[0]}, must be from 0 to {self.num_classes - 1}'
                f'{" (after 1 was taken away)" if self.zero_is_none else ""}, or {IGNORE} for none.')
        return image, labels

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.read(index)
        image = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        labels = tv_tensors.Mask(torch.from_numpy(labels))
        if self.transform is not None:
            image, labels = self.transform(image, labels)
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)


class LabelMapSplits(NamedTuple):
    """The two parts of a data set."""
    train: LabelMaps
    val: LabelMaps
    class_names: List[str]


def load_label_maps(recipe: SegmentationRecipe) -> LabelMapSplits:
    """Find the images to train on and those to hold out.

    A folder holds images/train, masks/train, images/val and masks/val, with maps of the same names that end in .png; or
    the same as ADE20K has them, images/training and annotations/training, with 0 for none. A file classes.txt, one name
    a line, names the classes.

    Raises:
        DataError: Files are missing, or nothing says what classes there are.
    """
    if recipe.data == 'shapes':
        sizes = [min(n, recipe.limit or n) for n in (recipe.train_images, recipe.val_images)]
        parts = [Shapes(n, recipe.size, seed) for seed, n in enumerate(sizes)]
        names = ['background', *CLASSES]
        return LabelMapSplits(*(LabelMaps(part, len(names)) for part in parts), names)
    folder = Path(recipe.data)
    found = [layout for layout in _LAYOUTS if (folder / layout[0][0]).is_dir()]
    if not found:
        raise DataError(
            f"data: got {recipe.data!r}, must be 'shapes' or a folder with images/train, masks/train, images/val and"
            f' masks/val, or with images/training, annotations/training, images/validation and annotations/validation.')
    names_file = folder / 'classes.txt'
    if names_file.is_file():
        names = [line.strip() for line in names_file.read_text(encoding='utf-8').splitlines() if line.strip()]
        if recipe.num_classes not in (None, len(names)):
            raise RecipeError(f'num_classes: got {recipe.num_classes}, {names_file} has {len(names)} names.')
    elif recipe.num_classes is not None:
        names = [str(i) for i in range(recipe.num_classes)]
    else:
        raise DataError(f'{folder}: has no file classes.txt; give num_classes.')
    *parts, zero_is_none = found[0]
    made = [LabelMaps(_pairs(folder / a, folder / b, recipe.limit), len(names), zero_is_none) for a, b in parts]
    return LabelMapSplits(*made, names)


def _pairs(images: Path, masks: Path, limit: int) -> List[Tuple[Path, Path]]:
    files = [f for f in images.rglob('*') if f.suffix.lower() in IMG_EXTENSIONS] if images.is_dir() else []
    if not files:
        raise DataError(f'{images}: has no images.')
    pairs = []
    for file in sorted(files, key=lambda f: natural_key(str(f)))[:limit or None]:
        mask = masks / file.relative_to(images).with_suffix('.png')
        if not mask.is_file():
            raise DataError(f'{mask}: is missing, the label map of {file}.')
        pairs.append((file, mask))
    return pairs


def train_transform(recipe: SegmentationRecipe) -> v2.Transform:
    """Resize, cut out, mirror and recolour an image and its labels alike."""
    steps = [
        v2.RandomResize(recipe.short_sides[0], recipe.short_sides[1] + 1),
        v2.RandomCrop(
            recipe.crop_size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORE, 'others': 0}),
        v2.RandomHorizontalFlip(recipe.hflip),
    ]
    return v2.Compose([*steps, v2.RandomPhotometricDistort()] if recipe.photometric else steps)


def build_segmenter(config: Dict[str, Any]) -> Segmenter:
    """A segmenter without weights, from the config of a saved one."""
    backbone = DenseBackbone(config['model'], model_args=config['model_args'])
    return Segmenter(
        backbone, len(config['class_names']), config['decoder'], config['decoder_args'], config['aux_channels'])


def load_segmenter(folder: Union[str, Path]) -> Tuple[Segmenter, Dict[str, Any]]:
    """A trained segmenter in evaluation mode, and its config, from the folder `model` of a run.

    Raises:
        WeightsError: There is no such model.
    """
    return load_model(folder, TASK, build_segmenter)


def predict_labels(model: nn.Module, image: torch.Tensor, config: Dict[str, Any]) -> torch.Tensor:
    """Classes (H, W) of an image's pixels, as a recipe's evaluation finds them.

    Args:
        model: Segmenter in evaluation mode.
        image: (3, H, W), uint8, on the device of the model.
        config: Values mean, std, eval_short_side, eval_window, eval_scales and eval_flip.
    """
    H, W = image.shape[-2:]
    x = normalise(image[None], config['mean'], config['std'])
    if config['eval_short_side']:
        scale = config['eval_short_side'] / min(H, W)
        x = nn.functional.interpolate(
            x, (max(1, round(H * scale)), max(1, round(W * scale))), mode='bilinear', align_corners=False,
            antialias=True)
    probabilities = segment(
        model, x, config['eval_scales'], config['eval_flip'], window=config['eval_window'] or None)
    if probabilities.shape[-2:] != (H, W):
        probabilities = nn.functional.interpolate(probabilities, (H, W), mode='bilinear', align_corners=False)
    return probabilities[0].argmax(0)


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Bytes (B, 3, H, W) as a model takes them."""
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images.float() / 255. - mean) / std


class SegmentationJob(Job):
    """Trains a segmenter as a `SegmentationRecipe` says."""
    metric = 'miou'
    outputs = (MODEL, PREDICTIONS)

    @classmethod
    def requirements(cls, recipe: SegmentationRecipe) -> List[Tuple[str, str]]:
        """Packages beyond the core that a recipe needs."""
        return [('segmentation_models_pytorch', 'segmentation')]

    def __init__(self, recipe: SegmentationRecipe, world: World) -> None:
        """
        Raises:
            RecipeError: A value of the recipe cannot be used.
            DataError: The data cannot be used.
        """
        self.recipe, self.world = recipe, world
        self.splits = load_label_maps(recipe)
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
            self.splits.train, recipe.batch_size, world, recipe.seed, recipe.accumulate, recipe.workers)
        if self.train_loader.batch_size // (world.size * recipe.accumulate) < 2:
            raise RecipeError('batch_size: must leave two images to each process and part, for batch normalisation.')
        missing = (torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((32, 32), IGNORE))
        self._eval_loader = eval_batches(self.splits.val, world, missing, recipe.workers)
        self.task = DenseTask(model.to(world.device), self._loss, world.device)
        self.config = {
            name: getattr(recipe, name) for name in (
                'model', 'model_args', 'decoder', 'decoder_args', 'aux_channels', 'mean', 'std', 'eval_short_side',
                'eval_window', 'eval_scales', 'eval_flip')}
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
        mean, std = (torch.tensor(v, device=args[0].device).view(1, -1, 1, 1) for v in (
            self.recipe.mean, self.recipe.std))
        return (args[0] * std + mean).clamp(0., 1.)

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
        rows = []
        with torch.no_grad():
            for i in range(min(8, len(self.splits.val))):
                try:
                    image, labels = self.splits.val.read(i)
                except (OSError, DataError):
                    continue
                x = v2.functional.pil_to_tensor(image).to(self.world.device)
                predicted = predict_labels(model, x, self.config).cpu().numpy()
                rows.append([image, overlay(image, labels), overlay(image, predicted)])
        if rows:
            contact_sheet(rows).save(folder / PREDICTIONS)
