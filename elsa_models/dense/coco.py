"""Objects on images: annotations in COCO's format, or drawn scenes; results in that format, and their measure."""
import contextlib
import io
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vf

from .._images import DataError, printable, read_image
from .coco_format import read_annotations
from .shapes import CLASSES, Shapes, boxes_of

_SPLITS = (('train', 'val'), ('train2017', 'val2017'))


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
            self.class_names = [printable(c['name']) for c in source.loadCats(self.category_ids)]
        self.image_ids = self.image_ids[:limit or None]

    def __len__(self) -> int:
        return len(self.image_ids)

    def skip_empty(self) -> None:
        """Leave out images without objects."""
        if not isinstance(self.source, Shapes):
            full = {a['image_id'] for a in self.source.dataset.get('annotations', []) if not a['iscrowd']}
            self.image_ids = [i for i in self.image_ids if i in full]
        else:
            self.image_ids = [i for i in self.image_ids if len(self.source[i].labels)]

    def read(self, index: int) -> Objects:
        """An image and its objects; crowds and what lies outside the image are left out.

        Raises:
            DataError: A file cannot be read, or is of another size than the annotations say.
        """
        number = self.image_ids[index]
        if isinstance(self.source, Shapes):
            scene = self.source[number]
            return Objects(scene.image, boxes_of(scene.masks), scene.labels + 1, scene.masks.astype(np.uint8))
        entry = self.source.imgs[number]
        file = self.folder / entry['file_name']
        image = read_image(file, 'RGB', file)
        W, H = image.size
        if (entry['height'], entry['width']) != (H, W):
            raise DataError(f'{file}: is of {W} x {H} pixels, its annotations of {entry["width"]} x {entry["height"]}.')
        boxes, labels, masks = [], [], []
        for a in self.source.imgToAnns.get(number, []):
            if a['iscrowd']:
                continue
            left, top, width, height = a['bbox']
            box = [max(0., left), max(0., top), min(W, left + width), min(H, top + height)]
            if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                continue
            if a.get('segmentation'):
                mask = self.source.annToMask(a)
            else:
                mask = np.zeros((H, W), dtype=np.uint8)
                mask[round(box[1]):round(box[3]), round(box[0]):round(box[2])] = 1
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
        return _index(dict(info={}, images=images, annotations=annotations, categories=categories))


def load_objects(
        data: str,
        sizes: Tuple[int, int] = (1000, 100),
        side: int = 96,
        limit: int = 0,
        need_masks: bool = True,
) -> Tuple[ObjectImages, ObjectImages]:
    """The images to train on and those to hold out.

    A folder holds train2017, val2017, annotations/instances_train2017.json and annotations/instances_val2017.json, or
    the same with train and val.

    Args:
        data: 'shapes', or a folder.
        sizes: Number of drawn images of each part.
        side: Height and width of drawn images.
        limit: Use at most this many images of each part, 0 for all.
        need_masks: Whether annotations without a mask are an error.

    Raises:
        DataError: Files are missing or cannot be read, there are no images, or the parts have other categories.
    """
    if data == 'shapes':
        train, val = (ObjectImages(Shapes(n, side, seed), limit=limit) for seed, n in enumerate(sizes))
    else:
        folder = Path(data)
        splits = [s for s in _SPLITS if (folder / 'annotations' / f'instances_{s[0]}.json').is_file()]
        if not splits:
            raise DataError(
                f"data: got {data!r}, must be 'shapes' or a folder with train2017, val2017 and"
                f' annotations/instances_train2017.json and annotations/instances_val2017.json, or with train and val.')
        train, val = (_load_coco(folder, split, limit, need_masks) for split in splits[0])
        if (train.category_ids, train.class_names) != (val.category_ids, val.class_names):
            raise DataError(f'{folder}: the annotations of {splits[0][1]} have other categories than {splits[0][0]}.')
    for part, images in (('train on', train), ('hold out', val)):
        if not len(images):
            raise DataError(f'{data}: there are no images to {part}.')
    return train, val


def _load_coco(folder: Path, split: str, limit: int, need_masks: bool) -> ObjectImages:
    file = folder / 'annotations' / f'instances_{split}.json'
    return ObjectImages(_index(read_annotations(file, need_masks)), folder / split, limit, need_masks)


def _index(data: Dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


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
