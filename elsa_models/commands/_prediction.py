"""What commands that predict maps or objects share: from options to pictures; errors in one line."""
import argparse
import logging
import sys
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.utils import setup_default_logging

from .._extras import require
from .._images import DataError, find_images, printable, read_image
from ..inference.classifier import find_device
from ..models._checkpoint import WeightsError


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


class Picture(NamedTuple):
    """An image to predict from."""
    file: str
    name: str  # of what is written for it, without an ending; unique
    image: Image.Image  # RGB


Predict = Callable[[argparse.Namespace, torch.device, Iterator[Picture]], None]


def predict_command(
        doc: str,
        extra: Tuple[str, str],
        add_options: Callable[[argparse.ArgumentParser], None],
        predict: Predict,
        argv: Optional[List[str]],
) -> int:
    """Run a command that predicts from images, and return its exit status: 1 if some cannot be read.

    Args:
        doc: Of the command.
        extra: A package that it needs, and the extra that brings it.
        add_options: Adds the command's own options to `inputs`, `model`, `output` and `device`.
        predict: Takes the arguments, a device, and the images, one by one; with the first the folder `output`
            exists.
        argv: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('inputs', nargs='+', metavar='IMAGES', help='image files, folders or patterns')
    parser.add_argument('--model', required=True, metavar='FOLDER', help='folder of a run, or its folder model')
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='folder for what is written')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ... (%(default)s)')
    add_options(parser)
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    status = 0

    def pictures(files: List[str]) -> Iterator[Picture]:
        nonlocal status
        args.output.mkdir(parents=True, exist_ok=True)  # by now the model is loaded
        for file, name in zip(files, unique_names(files), strict=True):
            try:
                image = read_image(Path(file), 'RGB', file)
            except DataError as e:
                print(printable(e), file=sys.stderr)
                status = 1
                continue
            yield Picture(file, name, image)

    try:
        require(*extra)
        device = find_device(args.device)
        files = find_images(args.inputs)
        predict(args, device, pictures(files))
    except (ValueError, WeightsError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return status
