"""Train a small classifier and see what it has learned: on handwritten digits, or on your own pictures.

    elsa quickstart
    elsa quickstart --data FOLDER

It is `elsa train` with the recipe that suits the data: digits, or folder for a FOLDER with one sub-folder of images for
each class. Every value of the recipe can be overridden by an option.
"""
import argparse
import sys
from typing import List, Optional

from ._training import train_command
from .train import report


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--config')
    parser.add_argument('--data', default='digits')
    known = parser.parse_known_args(argv)[0]
    recipe = [] if known.config is not None else ['--config', 'digits' if known.data == 'digits' else 'folder']
    return train_command(__doc__, 'classification', [*recipe, *argv], report)
