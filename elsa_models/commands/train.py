"""Train or fine-tune a classifier: on the handwritten digits of scikit-learn, a folder of images, or a data set.

    elsa train --config digits
    elsa train --config folder --data FOLDER
    torchrun --nproc-per-node 8 -m elsa_models train --config imagenet/elsa_swin_tiny --data FOLDER

Stopped at any moment, the same command goes on from the last checkpoint.

FOLDER holds one sub-folder of images for each class, or two folders of those named train and val. Every value of the
recipe can be overridden by an option.
"""
from typing import List, Optional

from ..training.jobs.classification import RANDOM_WEIGHTS
from ..training.run import Result
from ._training import train_command


def report(result: Result) -> None:
    """Print the accuracy of the best epoch, how to use its model, and what might help."""
    best, recipe = result.metrics, result.job.recipe
    print(f'held-out accuracy: {best["val_top1"]:.2f} % of {best["val_images"]} images, in epoch {best["epoch"]},'
          ' which was chosen by them: other images are recognised less often')
    if result.job.first_weights == RANDOM_WEIGHTS and recipe.data != 'digits':
        print('what would help most: weights (--pretrained with a model that has some, see configs/finetune.yaml), then'
              ' more images')
    print('load the model with:')
    print(f"  import elsa_models, timm; timm.create_model('local-dir:{result.folder / 'model'}', pretrained=True)")
    print(f'train it further, with a schedule of its own: the same command with --model {result.folder}')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return train_command(__doc__, 'classification', argv, report)
