#!/usr/bin/env python3
"""Train a segmenter: on drawn shapes, a folder of images and label maps, or ADE20K.

    python scripts/train_segmentation.py --config configs/segmentation/shapes.yaml
    python scripts/train_segmentation.py --config configs/segmentation/shapes.yaml --data FOLDER --name NAME
    torchrun --nproc-per-node 8 scripts/train_segmentation.py --config configs/segmentation/ade20k_elsa_swin_tiny.yaml

Stopped at any moment, the same command goes on from the last checkpoint. docs/dense.md says what FOLDER holds. Every
value of the recipe can be overridden by an option.
"""
import sys
from typing import List, Optional

import elsa_models  # noqa: F401, registers the models
from elsa_models._extras import require
from elsa_models.training.script import train_script


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    try:
        require('segmentation_models_pytorch', 'segmentation')
    except ImportError as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    from elsa_models.training.segmentation import SegmentationJob, SegmentationRecipe
    return train_script(__doc__, SegmentationRecipe, SegmentationJob, argv)


if __name__ == '__main__':
    sys.exit(main())
