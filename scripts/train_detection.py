#!/usr/bin/env python3
"""Train a detector: on drawn shapes, or images with annotations in COCO's format.

    python scripts/train_detection.py --config configs/detection/shapes.yaml
    python scripts/train_detection.py --config configs/detection/shapes.yaml --data FOLDER --name NAME
    torchrun --nproc-per-node 8 scripts/train_detection.py --config configs/detection/mask_rcnn_elsa_swin_tiny_1x.yaml

Stopped at any moment, the same command goes on from the last checkpoint. docs/dense.md says what FOLDER holds. Every
value of the recipe can be overridden by an option.
"""
import sys
from typing import List, Optional

from elsa_models.training.script import train_script


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return train_script(__doc__, 'detection', argv)


if __name__ == '__main__':
    sys.exit(main())
