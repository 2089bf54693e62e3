"""The command `elsa`, beside the package and not in it: what it offers is told without importing PyTorch.

Each of its commands is the function `main` of the module of that name in `elsa_models.commands`.
"""
import difflib
import importlib
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import List, Optional

COMMANDS = {  # in the order of use
    'quickstart': 'train a small classifier of digits, or of your pictures, and look at it',
    'train': 'train or fine-tune a classifier',
    'validate': 'measure a classifier',
    'predict': 'classify images',
    'export': 'export a model to ONNX',
    'train-detection': 'train a detector',
    'detect': 'find objects in images',
    'train-segmentation': 'train a segmenter',
    'segment': 'find what each pixel of an image belongs to',
    'token-labels': 'make maps of labels to train every token on',
    'convert': 'convert a checkpoint into a folder that timm reads',
    'publish': 'push such a folder to a hub',
    'study': 'compare mixers under equal conditions',
    'models': 'list the models with their parameters and multiply-accumulates',
    'recipes': 'list the recipes that --config takes by name',
}


def usage() -> str:
    """What `elsa --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, text in COMMANDS.items()]
    return '\n'.join(['usage: elsa COMMAND ...', '', *lines, '', 'elsa COMMAND --help says more.'])


def version() -> str:
    """The version of the package."""
    spec = importlib.util.find_spec('elsa_models')
    return runpy.run_path(str(Path(spec.origin).parent / '_version.py'))['__version__']


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: Its name and arguments, those of the process if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else '--help'
    if name in ('-h', '--help'):
        print(usage())
        return 0
    if name == '--version':
        print(f'elsa_models {version()}')
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f'did you mean {close[0]!r}?' if close else 'elsa --help lists them.'
        print(f'error: elsa has no command {name!r}; {hint}', file=sys.stderr)
        return 2
    command = importlib.import_module(f'elsa_models.commands.{name.replace("-", "_")}')
    sys.argv[0] = f'elsa {name}'  # what messages call the program
    return command.main(argv[1:])
