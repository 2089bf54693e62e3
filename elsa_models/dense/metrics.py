"""How well pixels are classified."""
from typing import Dict

import torch

IGNORE = 255  # label of pixels that do not count


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Require that labels are classes or 255.

    Raises:
        ValueError: One is neither.
    """
    strange = (labels < 0) | (labels >= num_classes) & (labels != IGNORE)
    if strange.any():
        raise ValueError(
            f'labels: got class {labels[strange][0].item()}, must be from 0 to {num_classes - 1}, or {IGNORE}.')


def confusion(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels (num_classes, num_classes) of each class, by row, that were given each class, by column.

    Args:
        predicted: Classes, of any shape.
        labels: Classes of the same shape, 255 for pixels that do not count.
        num_classes: Number of classes.

    Raises:
        ValueError: Shapes differ, or a class is out of range.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f'labels: got shape {tuple(labels.shape)}, must be {tuple(predicted.shape)} as predicted.')
    check_labels(labels, num_classes)
    valid = labels != IGNORE
    pairs = labels[valid].long() * num_classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes)


def segmentation_metrics(matrix: torch.Tensor) -> Dict[str, float]:
    """Mean intersection over union, mean accuracy of classes, and accuracy of pixels, in percent.

    Args:
        matrix: Of `confusion`, summed over all images. Classes that are neither there nor predicted do not count.
    """
    matrix = matrix.double()
    hits, there, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union = there + predicted - hits
    return dict(
        miou=100. * (hits / union)[union > 0].mean().item(),
        macc=100. * (hits / there)[there > 0].mean().item(),
        pixel_acc=100. * (hits.sum() / matrix.sum()).item(),
    )
