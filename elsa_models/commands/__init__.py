"""The command `elsa`: one module for each of its commands, which scripts/ call as well."""
import difflib
import importlib
import sys
from typing import List, Optional

from .._version import __version__

COMMANDS = {  # in the order of use; a command is the function `main` of the module of its name
    'train': 'train or fine-tune a classifier',
    'validate': 'measure a classifier',
    'predict': 'classify images',
    'export': 'export a model to ONNX',
    'train-detection': 'train a detector',
    'predict-detection': 'detect objects in images',
    'train-segmentation': 'train a segmenter',
    'predict-segmentation': 'segment images',
    'token-labels': 'make maps of labels to train every token on',
    'convert': 'convert a checkpoint into a folder that timm reads',
    'publish': 'push such a folder to a hub',
    'models': 'list the models with their parameters and multiply-accumulates',
}


def usage() -> str:
    """What `elsa --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, text in COMMANDS.items()]
    return '\n'.join(['usage: elsa COMMAND ...', '', *lines, '', 'elsa COMMAND --help says more.'])


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
        print(f'elsa_models {__version__}')
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f'did you mean {close[0]!r}?' if close else 'elsa --help lists them.'
        print(f'error: elsa has no command {name!r}; {hint}', file=sys.stderr)
        return 2
    command = importlib.import_module(f'.{name.replace("-", "_")}', __name__)
    sys.argv[0] = f'elsa {name}'  # what messages call the program
    return command.main(argv[1:])
