#!/usr/bin/env python3
"""Create a virtual environment, install this repository in it, and train a small model. Needs Python alone.

    python3 scripts/quickstart.py                                  # handwritten digits
    python3 scripts/quickstart.py --data FOLDER                    # one sub-folder of images for each class
    python3 scripts/quickstart.py --help                           # further options, those of scripts/train.py

The environment is .venv in the repository. A complete one is used again, a half-made one is repaired.
"""
import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
OLDEST = (3, 10)


def python_of(venv, os_name=os.name):
    """The interpreter of a virtual environment."""
    return venv / 'Scripts' / 'python.exe' if os_name == 'nt' else venv / 'bin' / 'python'


def fingerprint(root):
    """What decides the packages to install; another one calls for installing again."""
    content = b''.join((root / name).read_bytes() for name in ('setup.cfg', 'pyproject.toml'))
    return hashlib.sha256(content).hexdigest()


def check_python(version=sys.version_info):
    """Stop with a message where this Python cannot do the job."""
    if tuple(version[:2]) < OLDEST:
        sys.exit('error: this is Python {}.{}, but {}.{} or later is needed. Run the script with a later one, such as'
                 ' python3.12 scripts/quickstart.py'.format(*tuple(version[:2]) + OLDEST))
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as e:
        sys.exit(f'error: this Python lacks the module {e.name}, which makes virtual environments. On Debian and'
                 f' Ubuntu: sudo apt install python3-venv (or python{version[0]}.{version[1]}-venv)')


def works(python):
    """Whether an environment's interpreter runs and has pip."""
    try:
        return subprocess.call(
            [str(python), '-m', 'pip', '--version'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def prepare(root=ROOT, venv=VENV):
    """Make the environment complete, and return its interpreter.

    Raises:
        subprocess.CalledProcessError: A step failed; running again takes up where it stopped.
    """
    python, mark = python_of(venv), venv / 'elsa_models-installed'
    wanted = fingerprint(root)
    if mark.is_file() and mark.read_text() == wanted and works(python):
        print(f'using the environment {venv}')
        return python
    if not works(python):
        print(f'creating the environment {venv}', flush=True)
        subprocess.check_call([sys.executable, '-m', 'venv', '--clear', str(venv)])
    print('installing the package and what it needs; PyTorch is large, this takes a few minutes', flush=True)
    if mark.is_file():
        mark.unlink()
    subprocess.check_call(
        [str(python), '-m', 'pip', 'install', '--disable-pip-version-check', '-e', f'{root}[train,onnx]'])
    mark.write_text(wanted)
    return python


def read(arguments):
    """What of the training's options decides the recipe, or needs no training."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--config')
    parser.add_argument('--data', default='digits')
    parser.add_argument('-h', '--help', action='store_true')
    return parser.parse_known_args(arguments)[0]


def check_arguments(arguments, venv=VENV):
    """Answer --help, and stop at what cannot work, before anything is installed."""
    known = read(arguments)
    if known.help and not works(python_of(venv)):
        print(__doc__.strip())
        print('\nOnce the environment is installed, --help lists the options of scripts/train.py as well.')
        sys.exit(0)
    if known.config is not None and not Path(known.config).is_file():
        sys.exit(f'error: --config: got {known.config!r}, no such file')
    is_name = known.config is not None and '/' in known.data  # a recipe may use a data set by its name in timm
    if known.data != 'digits' and not Path(known.data).is_dir() and not is_name:
        sys.exit(f'error: --data: got {known.data!r}, must be a folder with one sub-folder of images for each class')


def command(python, arguments, root=ROOT):
    """The command line of the training, with the recipe that suits the arguments unless they name one."""
    known = read(arguments)
    recipe = []
    if known.config is None:
        name = 'digits.yaml' if known.data == 'digits' else 'folder.yaml'
        recipe = ['--config', str(root / 'configs' / name)]
    return [str(python), str(root / 'scripts' / 'train.py'), *recipe, *arguments]


def main():
    """Prepare the environment and become the training."""
    check_python()
    check_arguments(sys.argv[1:])
    try:
        python = prepare()
    except subprocess.CalledProcessError as e:
        sys.exit(f'error: {e.cmd[1:4]} failed, see above. Run the script again to take up where it stopped.')
    except KeyboardInterrupt:
        sys.exit('interrupted; run the script again to take up where it stopped.')
    arguments = command(python, sys.argv[1:])
    sys.stdout.flush()
    if os.name == 'nt':  # there, exec would return to the shell at once
        sys.exit(subprocess.call(arguments))
    os.execv(arguments[0], arguments)


if __name__ == '__main__':
    main()
