#!/usr/bin/env python3
"""Train or fine-tune a classifier: on the handwritten digits of scikit-learn, a folder of images, or a data set.

    python scripts/train.py --config configs/digits.yaml
    python scripts/train.py --config configs/folder.yaml --data FOLDER
    torchrun --nproc-per-node 8 scripts/train.py --config configs/imagenet/elsa_swin_tiny.yaml --data FOLDER

Stopped at any moment, the same command goes on from the last checkpoint.

FOLDER holds one sub-folder of images for each class, or two folders of those named train and val. Every value of the
recipe can be overridden by an option.
"""
import sys
from typing import List, Optional

from elsa_models.training.run import Result
from elsa_models.training.script import train_script


def report(result: Result) -> None:
    """Print the accuracy of the best epoch, and how to load its model."""
    best = result.metrics
    print(f'test accuracy: {best["val_top1"]:.2f} % of {best["val_images"]} held-out images, in epoch {best["epoch"]}')
    print('load the model with:')
    print(f"  import elsa_models, timm; timm.create_model('local-dir:{result.folder / 'model'}', pretrained=True)")


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return train_script(__doc__, 'classification', argv, report)


if __name__ == '__main__':
    sys.exit(main())
