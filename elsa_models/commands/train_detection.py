"""Train a detector: on drawn shapes, or images with annotations in COCO's format.

    elsa train-detection --config detection/shapes
    elsa train-detection --config detection/shapes --data FOLDER --name NAME
    torchrun --nproc-per-node 8 -m elsa_models train-detection --config detection/mask_rcnn_elsa_swin_tiny_1x

Stopped at any moment, the same command goes on from the last checkpoint. docs/dense.md says what FOLDER holds. Every
value of the recipe can be overridden by an option.
"""
from typing import List, Optional

from ._training import train_command


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return train_command(__doc__, 'detection', argv)
