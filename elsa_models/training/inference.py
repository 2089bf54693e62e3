"""A trained classifier at work: from a name or a file, PyTorch or ONNX, to numbers and classes."""
import glob
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .._extras import require
from ..models._checkpoint import WeightsError
from .classification import color_mode, create_eval_loader, predict, resolve_images
from .config import ImageValues, RecipeError, Validation
from .data import LabelledImages, create_eval_transform, load_splits
from .loading import DataError
from .world import World, join_world


class Classifier(NamedTuple):
    """A model and what it needs to be used."""
    logits: Callable[[torch.Tensor], torch.Tensor]  # of images (B, C, H, W), normalised, on `device`
    model: nn.Module  # in evaluation mode; with an ONNX file it says no more than how images are prepared
    data_config: Dict[str, Any]  # as timm.data.resolve_data_config returns it
    label_names: Optional[List[str]]  # None where they are not known
    num_classes: int


def load_classifier(
        name: str,
        device: torch.device,
        values: Optional[ImageValues] = None,
        model_args: Optional[Dict[str, Any]] = None,
        pretrained: bool = True,
        checkpoint: Optional[str] = None,
        onnx: Optional[str] = None,
        num_classes: Optional[int] = None,
) -> Classifier:
    """Load a classifier.

    Args:
        name: timm's name, `hf-hub:owner/name`, or `local-dir:folder`.
        device: Where it computes; an ONNX file computes on the CPU.
        values: Ways of preparing images that go before the model's own.
        model_args: Further arguments of the model.
        pretrained: Take the weights that the name stands for.
        checkpoint: Take the weights in this file instead.
        onnx: ONNX file that computes in place of the model.
        num_classes: Number of classes, None for the model's own.

    Raises:
        RecipeError: There is no such model, file or weights.
        ImportError: ONNX Runtime is missing.
    """
    for option, file in (('checkpoint', checkpoint), ('onnx', onnx)):
        if file is not None and not Path(file).is_file():
            raise RecipeError(f'{option}: got {file!r}, no such file.')
    overlay = None
    if checkpoint is not None:
        overlay = dict(file=checkpoint)
        if num_classes is not None:
            overlay.update(num_classes=num_classes)  # those of the file, or timm leaves its classifier out
    try:
        model = timm.create_model(
            name,
            pretrained=(pretrained and onnx is None) or checkpoint is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            **(model_args or {}),
        )
    except WeightsError as e:
        subject = 'model: ' if checkpoint is None else f'checkpoint: {checkpoint!r} cannot be used. '
        raise RecipeError(f'{subject}{e}\nOr name a file of weights: --checkpoint FILE.') from e
    except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
        raise RecipeError(f'model: {name!r} with model_args {model_args or {}} is not possible. {e}') from e
    model = model.to(device).eval()
    names = model.pretrained_cfg.get('label_names')
    names = list(names) if names is not None and len(names) == model.num_classes else None
    logits = _onnx_logits(onnx) if onnx is not None else model
    data_config = resolve_images(values or ImageValues(), model)
    return Classifier(logits, model, data_config, names, model.num_classes)


def _onnx_logits(file: str) -> Callable[[torch.Tensor], torch.Tensor]:
    onnxruntime = require('onnxruntime', 'onnx')
    try:
        session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    except Exception as e:  # of ONNX Runtime's own classes
        raise RecipeError(f'onnx: {file!r} cannot be read: {e}') from e
    inputs = session.get_inputs()[0]
    fixed = inputs.shape[0] if isinstance(inputs.shape[0], int) else None

    def logits(images: torch.Tensor) -> torch.Tensor:
        number, size = len(images), fixed or len(images)
        images = torch.nn.functional.pad(images.cpu(), (0, 0) * 3 + (0, -number % size))
        parts = [session.run(None, {inputs.name: x.numpy()})[0] for x in images.split(size)]
        return torch.cat([torch.from_numpy(part) for part in parts])[:number]

    return logits


def validate(values: Validation) -> Dict[str, Any]:
    """Measure a classifier on labelled images. Started by torchrun, all processes share the work.

    Args:
        values: Says which.

    Returns:
        Loss, top1 and top5 accuracy in percent, the number of images, and images_per_second with loading.

    Raises:
        RecipeError: There is no such model, or it has other classes than the data.
        DataError: The data cannot be used.
    """
    world = join_world(values.device)
    splits = load_splits(values, batch_size=values.batch_size)
    classifier = load_classifier(
        values.model, world.device, values, values.model_args, values.pretrained, values.checkpoint, values.onnx,
        values.num_classes)
    dataset = splits.part(values.part)
    dataset.transform = create_eval_transform(classifier.data_config)
    splits.set_mode(color_mode(classifier.data_config))
    if isinstance(dataset, LabelledImages):
        dataset.mode = color_mode(classifier.data_config)
    order = _class_order(classifier, splits.class_names)
    dtype = getattr(torch, values.amp) if values.amp else None

    def logits(images: torch.Tensor) -> torch.Tensor:
        if values.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        out = classifier.logits(images).to(images.device)
        return out if order is None else out[:, order]

    loader = create_eval_loader(dataset, values.batch_size, world, classifier.data_config, values.workers)
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(world.device.type, dtype) if dtype else nullcontext():
        predictions = predict(logits, loader, world)
    metrics = predictions.metrics()
    metrics['images_per_second'] = metrics['images'] / (time.perf_counter() - start)
    # of a stream nobody knows; counted as they are read, those of a repeated batch would count twice
    metrics['unreadable'] = len(dataset) - metrics['images'] if loader.samples is not None else 0
    return metrics


def _class_order(classifier: Classifier, class_names: Sequence[str]) -> Optional[List[int]]:
    """The outputs that stand for the classes of the data, or None for all in their order."""
    names = classifier.label_names
    if names is not None and set(class_names) <= set(names):
        order = [names.index(name) for name in class_names]
        return None if order == list(range(len(names))) else order
    if classifier.num_classes != len(class_names):
        raise RecipeError(
            f'model: it has {classifier.num_classes} classes, the data has {len(class_names)}, and their names do not'
            f' match.')
    return None


class _Files(Dataset):
    """Image files, with class 0."""

    def __init__(self, files: Sequence[str], mode: str, transform: Callable) -> None:
        self.images = LabelledImages([Path(file) for file in files], [0] * len(files), mode)
        self.images.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


def find_images(inputs: Sequence[str]) -> List[str]:
    """Image files from names of files and folders, and patterns such as 'shots/**/*.jpg', in natural order.

    Raises:
        DataError: An input names nothing.
    """
    files: List[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found = [os.path.join(root, f) for root, _, names in os.walk(name) for f in names
                     if f.lower().endswith(IMG_EXTENSIONS) and not f.startswith('.')]
        elif os.path.isfile(name):
            found = [name]
        else:
            found = [f for f in glob.glob(name, recursive=True) if os.path.isfile(f)]
        if not found:
            raise DataError(f'{name}: no such image, folder of images, or pattern that fits any.')
        files += sorted(found, key=natural_key)
    return list(dict.fromkeys(files))


def unique_names(files: Sequence[str]) -> List[str]:
    """A name without ending for the results of each file, numbered where files of several folders share theirs."""
    names: List[str] = []
    for file in files:
        stem, number = Path(file).stem, 1
        name = stem
        while name in names:
            number += 1
            name = f'{stem}-{number}'
        names.append(name)
    return names


class Answer(NamedTuple):
    """The likeliest classes of one image, the likeliest first; none where it cannot be read."""
    file: str
    labels: List[str]
    probabilities: List[float]


@torch.no_grad()
def classify(
        classifier: Classifier,
        files: Sequence[str],
        device: torch.device,
        top_k: int = 5,
        batch_size: int = 16,
        workers: int = 0,
) -> List[Answer]:
    """Name the likeliest classes of image files.

    Args:
        classifier: From `load_classifier`.
        files: Image files.
        device: Where the model is.
        top_k: Classes for each image.
        batch_size: Images that are computed at once.
        workers: Processes that load.
    """
    config = classifier.data_config
    dataset = _Files(files, color_mode(config), create_eval_transform(config))
    loader = create_eval_loader(dataset, batch_size, World(device), config, workers)
    names = classifier.label_names or [str(i) for i in range(classifier.num_classes)]
    answers = []
    for images, targets in loader:
        probabilities, classes = classifier.logits(images).float().softmax(dim=-1).topk(min(top_k, len(names)))
        for target, p, c in zip(targets.tolist(), probabilities.tolist(), classes.tolist(), strict=True):
            file = str(files[len(answers)])
            answers.append(Answer(file, [names[i] for i in c], p) if target >= 0 else Answer(file, [], []))
    return answers
