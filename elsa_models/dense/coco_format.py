"""The checks of annotations in COCO's format: pycocotools trusts them, and crashes or hangs on some."""
import json
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Optional

from pycocotools import mask as rle

from .._images import DataError


def read_annotations(file: Path, need_masks: bool = True) -> Dict[str, Any]:
    """Annotations, each of them checked; a missing iscrowd is 0, a missing area that of the mask or the box.

    Args:
        file: JSON file.
        need_masks: Whether objects without a mask are an error.

    Raises:
        DataError: The file cannot be read, or an entry is not as COCO's format has it; names file and id.
    """
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{file}: cannot be read as annotations in COCO's format ({type(e).__name__}: {e}).") from e
    if not isinstance(data, dict):
        raise DataError(f"{file}: cannot be read as annotations in COCO's format, which are an object.")
    images = _by_id(file, data, 'images', 'image')
    categories = _by_id(file, data, 'categories', 'category')
    annotations = _by_id(file, data, 'annotations', 'annotation')
    if not categories:
        raise DataError(f'{file}: lists no categories.')
    for name, entries, check in (
            ('image', images, _image_fault),
            ('category', categories, lambda entry: None if isinstance(entry.get('name'), str) else 'has no name'),
            ('annotation', annotations, lambda entry: _annotation_fault(entry, images, categories, need_masks)),
    ):
        for number, entry in entries.items():
            fault = check(entry)
            if fault is not None:
                raise DataError(f'{file}: {name} {number} {fault}.')
    return data


def _by_id(file: Path, data: Dict[str, Any], key: str, name: str) -> Dict[int, Dict[str, Any]]:
    entries = data.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{file}: cannot be read as annotations in COCO's format: {key} must be a list of objects.")
    found: Dict[int, Dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        number = entry.get('id')
        if type(number) is not int:
            raise DataError(f'{file}: {name} at place {place} has id {number!r:.50}, must be a whole number.')
        if number in found:
            raise DataError(f'{file}: {name} {number} is there twice.')
        found[number] = entry
    return found


def _image_fault(image: Dict[str, Any]) -> Optional[str]:
    name = image.get('file_name')
    if not isinstance(name, str) or not name or '\0' in name:
        return f'has file_name {name!r:.50}, must be the name of a file'
    path = PurePosixPath(name.replace('\\', '/'))
    if path.is_absolute() or '..' in path.parts or path.parts and path.parts[0].endswith(':'):
        return f'has file_name {name!r:.50}, which leaves the folder of the images'
    for side in ('height', 'width'):
        if type(image.get(side)) is not int or not 0 < image[side] < 2 ** 16:
            return f'has {side} {image.get(side)!r:.50}, must be a whole number of pixels'
    return None


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)  # no NaN


def _annotation_fault(
        annotation: Dict[str, Any],
        images: Dict[int, Dict[str, Any]],
        categories: Dict[int, Dict[str, Any]],
        need_masks: bool,
) -> Optional[str]:
    """What is wrong with an annotation, None for nothing; what may be left out is filled in."""
    for key, known in (('image_id', images), ('category_id', categories)):
        number = annotation.get(key)
        if type(number) is not int or number not in known:
            return f'has an unlisted {key.partition("_")[0]} {number!r:.50}'
    box = annotation.get('bbox')
    if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return f'has bbox {box!r:.80}, must be left, top, width and height in pixels'
    crowd = annotation.setdefault('iscrowd', 0)
    if crowd not in (0, 1) or not isinstance(crowd, int):
        return f'has iscrowd {crowd!r:.50}, must be 0 or 1'
    annotation['iscrowd'] = int(crowd)
    image = images[annotation['image_id']]
    segmentation = annotation.get('segmentation')
    if segmentation:
        fault = _mask_fault(segmentation, image['height'], image['width'])
        if fault is not None:
            return f'has a mask {fault}'
    elif need_masks and not crowd:
        return 'has no mask'
    if annotation.get('area') is None:
        annotation['area'] = float(box[2] * box[3])
        if segmentation:
            parts = rle.frPyObjects(segmentation, image['height'], image['width'])
            annotation['area'] = float(rle.area(rle.merge(parts) if isinstance(parts, list) else parts))
    if not _are_numbers([annotation['area']]) or annotation['area'] < 0:
        return f'has area {annotation["area"]!r:.50}, must be a number of pixels'
    return None


def _mask_fault(mask: Any, height: int, width: int) -> Optional[str]:
    """What is wrong with polygons or run lengths of an image."""
    if isinstance(mask, list):
        far = 2 * max(height, width)
        for polygon in mask:
            if not _are_numbers(polygon) or len(polygon) % 2 or len(polygon) < 6:
                return 'that is no list of polygons, each of the coordinates of at least three points'
            if min(polygon) < -far or max(polygon) > far:
                return f'with a point far beyond the image, {min(polygon):g} to {max(polygon):g}'
        return None
    if not isinstance(mask, dict):
        return f'of type {type(mask).__name__}, must be polygons or run lengths'
    if mask.get('size') != [height, width]:
        return f'of size {mask.get("size")!r:.50}, its image is of {[height, width]}'
    counts = mask.get('counts')
    if isinstance(counts, str):
        try:
            counts = _decode_counts(counts)
        except ValueError:
            return 'whose run lengths cannot be read'
    if not isinstance(counts, list) or not all(type(c) is int and c >= 0 for c in counts):
        return 'whose run lengths are no whole numbers'
    if sum(counts) != height * width:
        return f'whose run lengths add up to {sum(counts)}, must be {height * width}'
    return None


def _decode_counts(text: str) -> List[int]:
    """Run lengths from COCO's code of them: five bits a character, from the third on differences."""
    counts: List[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError
    return counts
