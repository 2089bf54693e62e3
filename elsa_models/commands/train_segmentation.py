"""Train a segmenter: on drawn shapes, a folder of images and label maps, or ADE20K.

    elsa train-segmentation --config segmentation/shapes
    elsa train-segmentation --config segmentation/shapes --data FOLDER --name NAME
    torchrun --nproc-per-node 8 -m elsa_models train-segmentation --config segmentation/ade20k_elsa_swin_tiny

Stopped at any moment, the same command goes on from the last checkpoint. docs/dense.md says what FOLDER holds. Every
value of the recipe can be overridden by an option.
"""
from typing import List, Optional

from ._training import train_command


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return train_command(__doc__, 'segmentation', argv)
