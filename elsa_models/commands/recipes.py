"""List the recipes of this package, each with what it is for.

    elsa recipes

`--config NAME` takes them: elsa train those without a folder and those of imagenet, elsa train-detection and
elsa train-segmentation those of the folders of their names.
"""
import argparse
from typing import List, Optional

from ..training.config import find_recipe, recipe_names


def main(argv: Optional[List[str]] = None) -> int:
    """Print the names and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.parse_args(argv)
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        first = find_recipe(name).read_text(encoding='utf-8').partition('\n')[0]
        print(f'{name:{width}}  {first.lstrip("# ") if first.startswith("#") else ""}'.rstrip())
    return 0
