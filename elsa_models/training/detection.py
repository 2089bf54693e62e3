"""Detectors: data, loss and evaluation of object detection and instance segmentation."""
import contextlib
import dataclasses
import io
import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vf

from ..dense.detection import DETECTORS, check_targets, create_detector, losses_of
from ..dense.draw import contact_sheet, draw_objects
from ..dense.features import DenseBackbone
from ..dense.shapes import CLASSES, Shapes, boxes_of
from .config import RecipeError, _value
from .data import decode
from .dense import MODEL, DenseRecipe, DenseTask, create_backbone, eval_batches, load_model, save_model
from .job import Job
from .loading import DataError, TrainLoader
from .world import World

_logger = logging.getLogger(__name__)

TASK = 'object-detection'
PREDICTIONS = 'predictions.png'
_SPLITS = (('train', 'val'), ('train2017', 'val2017'))


@dataclasses.dataclass
class DetectionRecipe(DenseRecipe):
    """The recipe of a detector."""
    # model
    detector: str = _value('mask_rcnn', 'what finds objects on the maps of the backbone', choices=DETECTORS)
    detector_args: Dict[str, Any] = _value({}, "further arguments of torchvision's class, as box_nms_thresh")
    anchor_sizes: Tuple[int, ...] = _value((32, 64, 128, 256, 512), 'side of the anchors of each map, in pixels', low=1)
    fpn_channels: int = _value(256, 'channels of the pyramid and the convolutions of all heads', low=8)
    head_channels: int = _value(1024, 'channels of the linear layers of the box heads', low=8)
    # images
    skip_empty: bool = _value(False, 'leave out images without objects in training')
    short_sides: Tuple[int, ...] = _value((96,), 'shorter sides in training, of which one is drawn', low=32)
    max_side: int = _value(1333, 'largest longer side in training and evaluation', low=32)
    crop_prob: float = _value(0., 'probability that a part is cut out in training and resized', low=0., high=1.)
    crop_short_sides: Tuple[int, ...] = _value((400, 500, 600), 'shorter sides before that', low=32)
    crop_range: Tuple[int, int] = _value((384, 600), 'range of its height and width', low=16)
    eval_short_side: int = _value(96, 'shorter side in evaluation', low=32)


class Objects(NamedTuple):
    """An image and the objects on it."""
    image: Image.Image
    boxes: np.ndarray  # N, 4: left, top, right, bottom in pixels, within the image, float32
    labels: np.ndarray  # N: classes from 1, int64
    masks: np.ndarray  # N, H, W: uint8


class ObjectImages(Dataset):
    """Images with boxes, masks and labels: annotations in COCO's format, or scenes of `Shapes`.

    `transform` maps an image and a dictionary of boxes, labels and masks to the same; None leaves them.
    """

    def __init__(
            self,
            source: Union[Shapes, COCO],
            folder: Optional[Path] = None,
            limit: int = 0,
            need_masks: bool = True,
    ) -> None:
        """
        Args:
            source: Scenes, or annotations.
            folder: Folder of the images, for annotations.
            limit: Use at most this many images, 0 for all.
            need_masks: Whether annotations without a mask are an error; otherwise they get their box as one.
        """
        self.source, self.folder, self.need_masks = source, folder, need_masks
        self.transform: Optional[v2.Transform] = None
        if isinstance(source, Shapes):
            self.image_ids = list(range(len(source)))
            self.category_ids = list(range(1, len(CLASSES) + 1))
            self.class_names = list(CLASSES)
        else:
            self.image_ids = sorted(source.getImgIds())
            self.category_ids = sorted(source.getCatIds())
            self.class_names = [c['name'] for c in source.loadCats(self.category_ids)]
        self.image_ids = self.image_ids[:limit or None]

    def __len__(self) -> int:
        return len(self.image_ids)

    def skip_empty(self) -> None:
        """Leave out images without objects."""
        if not isinstance(self.source, Shapes):
            full = {a['image_id'] for a in self.source.dataset.get('annotations', []) if not a.get('iscrowd')}
            self.image_ids = [i for i in self.image_ids if i in full]
        else:
            self.image_ids = [i for i in self.image_ids if len(self.source[i].labels)]

    def read(self, index: int) -> Objects:
        """An image and its objects; crowds and what lies outside the image are left out.

        Raises:
            DataError: A file cannot be read, or is of another size than the annotations say, or these have no such
                category.
        """
        number = self.image_ids[index]
        if isinstance(self.source, Shapes):
            scene = self.source[number]
            return Objects(scene.image, boxes_of(scene.masks), scene.labels + 1, scene.masks.astype(np.uint8))
        entry = self.source.imgs[number]
        file = self.folder / entry['file_name']
        image = decode(file, 'RGB', file)
        W, H = image.size
        if (entry['height'], entry['width']) != (H, W):
            raise DataError(f'{file}: is of {W} x {H} pixels, its annotations of {entry["width"]} x {entry["height"]}.')
        boxes, labels, masks = [], [], []
        for a in self.source.imgToAnns.get(number, []):
            if a.get('iscrowd'):
                continue
            if a['category_id'] not in self.category_ids:
                raise DataError(f'{file}: annotation {a.get("id")} has an unlisted category {a["category_id"]}.')
            left, top, width, height = a['bbox']
            box = [max(0., left), max(0., top), min(W, left + width), min(H, top + height)]
            if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                continue
            try:
                if a.get('segmentation') or self.need_masks:
                    mask = self.source.annToMask(a)
                else:
                    mask = np.zeros((H, W), dtype=np.uint8)
                    mask[round(box[1]):round(box[3]), round(box[0]):round(box[2])] = 1
            except Exception as e:  # pycocotools raises bare exceptions
                raise DataError(f'{file}: annotation {a.get("id")} has a mask that cannot be read ({e}).') from e
            if mask.shape != (H, W):
                raise DataError(
                    f'{file}: annotation {a.get("id")} has a mask of {mask.shape[1]} x {mask.shape[0]} pixels, the'
                    f' image is of {W} x {H}.')
            boxes.append(box)
            labels.append(self.category_ids.index(a['category_id']) + 1)
            masks.append(mask)
        return Objects(
            image,
            np.array(boxes, dtype=np.float32).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.stack(masks) if masks else np.zeros((0, H, W), dtype=np.uint8))

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        found = self.read(index)
        image = tv_tensors.Image(vf.pil_to_tensor(found.image))
        target = dict(
            boxes=tv_tensors.BoundingBoxes(
                torch.from_numpy(found.boxes), format='XYXY', canvas_size=image.shape[-2:]),
            labels=torch.from_numpy(found.labels),
            masks=tv_tensors.Mask(torch.from_numpy(found.masks)),
        )
        if self.transform is not None:
            image, target = self.transform(image, target)
        return image.as_subclass(torch.Tensor), {k: x.as_subclass(torch.Tensor) for k, x in target.items()}

    def ground_truth(self) -> COCO:
        """All annotations in pycocotools' form."""
        if isinstance(self.source, COCO):
            return self.source
        images, annotations = [], []
        for i in self.image_ids:
            found = self.read(i)
            images.append(dict(id=i, height=found.image.height, width=found.image.width))
            for box, label, mask in zip(found.boxes.tolist(), found.labels.tolist(), found.masks):
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=i, category_id=label, iscrowd=0, area=float(mask.sum()),
                    bbox=_xywh(box), segmentation=_encode(mask)))
        categories = [dict(id=i, name=name) for i, name in zip(self.category_ids, self.class_names)]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = dict(info={}, images=images, annotations=annotations, categories=categories)
            truth.createIndex()
        return truth


def load_objects(recipe: DetectionRecipe) -> Tuple[ObjectImages, ObjectImages]:
    """The images to train on and those to hold out.

    A folder holds train2017, val2017, annotations/instances_train2017.json and annotations/instances_val2017.json, or
    the same with train and val.

    Raises:
        DataError: Files are missing or cannot be read, there are no images, or the parts have other categories.
    """
    if recipe.data == 'shapes':
        sizes = ((recipe.train_images, 0), (recipe.val_images, 1))
        train, val = (ObjectImages(Shapes(n, recipe.size, seed), limit=recipe.limit) for n, seed in sizes)
    else:
        folder = Path(recipe.data)
        splits = [s for s in _SPLITS if (folder / 'annotations' / f'instances_{s[0]}.json').is_file()]
        if not splits:
            raise DataError(
                f"data: got {recipe.data!r}, must be 'shapes' or a folder with train2017, val2017 and"
                f' annotations/instances_train2017.json and annotations/instances_val2017.json, or with train and val.')
        need_masks = recipe.detector != 'retinanet'
        train, val = (_load_coco(folder, split, recipe.limit, need_masks) for split in splits[0])
        if (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
            raise DataError(f'{folder}: the annotations of {splits[0][1]} have other categories than {splits[0][0]}.')
    if recipe.skip_empty:
        train.skip_empty()
    for part, images in (('train on', train), ('hold out', val)):
        if not len(images):
            raise DataError(f'{recipe.data}: there are no images to {part}.')
    return train, val


def _load_coco(folder: Path, split: str, limit: int, need_masks: bool) -> ObjectImages:
    file = folder / 'annotations' / f'instances_{split}.json'
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
        images = ObjectImages(coco, folder / split, limit, need_masks)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
        raise DataError(f"{file}: cannot be read as annotations in COCO's format ({type(e).__name__}: {e}).") from e
    if not images.category_ids:
        raise DataError(f'{file}: lists no categories.')
    return images


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


def _xywh(box: Sequence[float]) -> List[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _encode(mask: np.ndarray) -> Dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=encoded['size'], counts=encoded['counts'].decode())


def to_coco(found: Dict[str, torch.Tensor], image_id: int, category_ids: Sequence[int]) -> List[Dict[str, Any]]:
    """What a detector finds on an image, in COCO's format of results.

    Args:
        found: Boxes, labels from 1, scores, and masks (N, 1, H, W) if there are any.
        image_id: Number of the image.
        category_ids: Category of each label.
    """
    results = []
    for i in range(len(found['boxes'])):
        result = dict(
            image_id=image_id, category_id=category_ids[int(found['labels'][i]) - 1],
            bbox=_xywh(found['boxes'][i].tolist()), score=float(found['scores'][i]))
        if 'masks' in found:
            result['segmentation'] = _encode((found['masks'][i, 0] > 0.5).cpu().numpy())
        results.append(result)
    return results


def average_precision(
        truth: COCO,
        results: List[Dict[str, Any]],
        image_ids: Sequence[int],
        kind: str,
) -> Dict[str, float]:
    """COCO's AP, AP50 and AP75 in percent, computed by pycocotools.

    Args:
        truth: Annotations.
        results: In COCO's format.
        image_ids: Images that count.
        kind: 'bbox' or 'segm'.
    """
    if not results:
        return dict(ap=0., ap50=0., ap75=0.)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), kind)
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (100. * max(0., float(v)) for v in evaluation.stats[:3])
    return dict(ap=ap, ap50=ap50, ap75=ap75)


def build_detector(config: Dict[str, Any], backbone: Optional[DenseBackbone] = None) -> nn.Module:
    """A detector from the config of a saved one; its backbone has no weights if None."""
    return create_detector(
        backbone or DenseBackbone(config['model'], model_args=config['model_args']),
        len(config['class_names']),
        config['detector'],
        config['anchor_sizes'],
        config['fpn_channels'],
        config['head_channels'],
        config['eval_short_side'],
        config['max_side'],
        config['mean'],
        config['std'],
        config['detector_args'],
    )


def load_detector(folder: Union[str, Path]) -> Tuple[nn.Module, Dict[str, Any]]:
    """A trained detector in evaluation mode, and its config, from the folder `model` of a run.

    Raises:
        WeightsError: There is no such model.
    """
    return load_model(folder, TASK, build_detector)


def _collate(samples: List[Any]) -> Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]]:
    images, targets = zip(*samples)
    return list(images), list(targets)


class DetectionJob(Job):
    """Trains a detector as a `DetectionRecipe` says."""
    metric = 'box_ap'
    outputs = (MODEL, PREDICTIONS)

    @classmethod
    def requirements(cls, recipe: DetectionRecipe) -> List[Tuple[str, str]]:
        """Packages beyond the core that a recipe needs."""
        return [('pycocotools', 'detection')]

    def __init__(self, recipe: DetectionRecipe, world: World) -> None:
        """
        Raises:
            RecipeError: A value of the recipe cannot be used.
            DataError: The data cannot be used.
        """
        self.recipe, self.world = recipe, world
        self.train_images, self.val_images = load_objects(recipe)
        self.class_names = self.train_images.class_names
        if recipe.crop_range[0] > recipe.crop_range[1]:
            raise RecipeError(f'crop_range: got {recipe.crop_range}, must be the lower and the upper end.')
        self.train_images.transform = train_transform(recipe)
        self.config = {
            name: getattr(recipe, name) for name in (
                'model', 'model_args', 'detector', 'detector_args', 'anchor_sizes', 'fpn_channels', 'head_channels',
                'eval_short_side', 'max_side', 'mean', 'std')}
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
            collate=_collate)
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
        rows = []
        for i in range(min(8, len(self.val_images))):
            try:
                found = self.val_images.read(i)
            except (OSError, DataError):
                continue
            truth = dict(
                boxes=torch.from_numpy(found.boxes), labels=torch.from_numpy(found.labels),
                masks=torch.from_numpy(found.masks)[:, None])
            predicted = detect(model, found.image)
            rows.append([found.image, draw_objects(found.image, truth, self.class_names),
                         draw_objects(found.image, predicted, self.class_names)])
        if rows:
            contact_sheet(rows).save(folder / PREDICTIONS)


@torch.no_grad()
def detect(model: nn.Module, image: Image.Image, threshold: float = 0.5) -> Dict[str, torch.Tensor]:
    """What a detector finds on an image, on the CPU.

    Args:
        model: Detector in evaluation mode.
        image: Of any size.
        threshold: Lowest score.
    """
    x = vf.pil_to_tensor(image.convert('RGB')).to(next(model.parameters()).device).float() / 255.
    found, = model([x])
    keep = found['scores'] >= threshold
    return {k: v[keep].cpu() for k, v in found.items()}
