"""Measuring a classifier on labelled images."""
import dataclasses
import time
from contextlib import nullcontext
from typing import Any, Dict, List, Optional, Sequence

import torch

from ..inference.classifier import Classifier, color_mode, create_eval_transform, load_classifier
from ..models._naming import ModelError, find_model
from .config import ImageValues, Recipe, RecipeError, Validation, load_recipe
from .data import LabelledImages, load_splits
from .evaluation import create_eval_loader, predict, reestimate
from .world import join_world


def validate(values: Validation) -> Dict[str, Any]:
    """Measure a classifier on labelled images. Started by torchrun, all processes share the work.

    Args:
        values: Says which.

    Returns:
        Loss, top1 and top5 accuracy in percent, the number of images, and images_per_second with loading.

    Raises:
        ModelError: There is no such model, or it has other classes than the data.
        DataError: The data cannot be used.
        RecipeError: Statistics are to be found anew, and cannot be.
    """
    values = _with_data(values)
    world = join_world(values.device)
    splits = load_splits(values, batch_size=values.batch_size)
    classifier = load_classifier(
        values.model, world.device, values.preparation(), values.model_args, values.pretrained, values.checkpoint,
        values.onnx, values.num_classes)
    if values.reestimate:
        if not isinstance(classifier.logits, torch.nn.Module):
            raise RecipeError('reestimate: statistics in an ONNX file cannot change; must be 0.')
        splits.set_mode(color_mode(classifier.data_config))
        reestimate(
            classifier.model, splits.train, values.reestimate, values.batch_size, world, classifier.data_config,
            values.workers, report=world.is_main and values.part == 'val')
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


def _with_data(values: Validation) -> Validation:
    """The values with data: where none is given, those of the run that the model is from, with the same part held out.

    Raises:
        RecipeError: The run's recipe cannot be read.
    """
    if values.data is not None:
        return values
    source = find_model(values.model)
    found = Recipe() if source.run is None else load_recipe(source.run / 'recipe.yaml')
    prepared = {} if source.checkpoint is not None else ImageValues().preparation()  # a saved model says it itself
    names = [f.name for f in dataclasses.fields(ImageValues) if f.name not in prepared]
    default = Validation()
    return dataclasses.replace(values, **{
        name: getattr(found, name) for name in names if getattr(values, name) == getattr(default, name)})


def _class_order(classifier: Classifier, class_names: Sequence[str]) -> Optional[List[int]]:
    """The outputs that stand for the classes of the data, or None for all in their order."""
    names = classifier.label_names
    if names is not None and set(class_names) <= set(names):
        order = [names.index(name) for name in class_names]
        return None if order == list(range(len(names))) else order
    if classifier.num_classes != len(class_names):
        raise ModelError(
            f'model: it has {classifier.num_classes} classes, the data has {len(class_names)}, and their names do not'
            f' match.')
    return None
