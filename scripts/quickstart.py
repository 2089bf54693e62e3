#!/usr/bin/env python3
"""Create a virtual environment, install this repository in it, and train a small model. Needs Python alone.

    python3 scripts/quickstart.py                                  # handwritten digits
    python3 scripts/quickstart.py --data FOLDER                    # one sub-folder of images for each class
    python3 scripts/quickstart.py --no-venv                        # into the environment of this python3
    python3 scripts/quickstart.py --help                           # further options, those of `elsa train`

The environment is .venv in the repository. A complete one is used again, a half-made one is repaired. --torch cpu takes
PyTorch's build without CUDA, a quarter of the size on disk, --torch pypi that of PyPI; without either, it is the former
on Linux without an NVIDIA GPU. A PyTorch that is there already stays, if it is not too old.
"""
import argparse
import configparser
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
OLDEST = (3, 11)
CPU_INDEX = 'https://download.pytorch.org/whl/cpu'


def python_of(venv, os_name=os.name):
    """The interpreter of a virtual environment."""
    return venv / 'Scripts' / 'python.exe' if os_name == 'nt' else venv / 'bin' / 'python'


def fingerprint(root):
    """What decides the packages to install; another one calls for installing again."""
    content = b''.join((root / name).read_bytes() for name in ('setup.cfg', 'pyproject.toml'))
    return hashlib.sha256(content).hexdigest()


def check_python(version=sys.version_info, needs_venv=True):
    """Stop with a message where this Python cannot do the job."""
    if tuple(version[:2]) < OLDEST:
        sys.exit('error: this is Python {}.{}, but {}.{} or later is needed. Run the script with a later one, such as'
                 ' python3.12 scripts/quickstart.py'.format(*tuple(version[:2]) + OLDEST))
    if not needs_venv:
        return
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


def clashes(python):
    """Whether torchvision was built for another PyTorch than the environment has."""
    return subprocess.call([str(python), '-c', 'import torchvision'], stderr=subprocess.DEVNULL) != 0


def is_small(torch, system=sys.platform):
    """Whether to install PyTorch's build without CUDA; PyPI's builds for other systems than Linux are that anyway."""
    if torch != 'auto':
        return torch == 'cpu'
    return system == 'linux' and shutil.which('nvidia-smi') is None and not Path('/dev/nvidia0').exists()


def install(python, root, torch):
    """Install the package and what it needs, and leave alone what is there and new enough.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    print('installing the package and what it needs; PyTorch is large, this takes a few minutes', flush=True)
    pip = [str(python), '-m', 'pip', 'install', '--disable-pip-version-check']
    if is_small(torch):
        config = configparser.ConfigParser()
        config.read(str(root / 'setup.cfg'))
        needed = [r for r in config['options']['install_requires'].split() if r.startswith('torch')]
        try:
            subprocess.check_call([*pip, '--retries', '1', '--timeout', '20', '--index-url', CPU_INDEX, *needed])
        except subprocess.CalledProcessError:
            if torch == 'cpu':
                raise
            print(f'{CPU_INDEX} cannot be had: installing the large build of PyPI', flush=True)
        else:
            if clashes(python):  # pip's configuration may name other places, one of which has half of it
                print(f'{CPU_INDEX} lacks a part of PyTorch: installing the large build of PyPI', flush=True)
                subprocess.check_call([str(python), '-m', 'pip', 'uninstall', '--yes', 'torch', 'torchvision'])
    subprocess.check_call([*pip, '-e', f'{root}[train,onnx]'])


def prepare(root=ROOT, venv=VENV, torch='auto'):
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
    if mark.is_file():
        mark.unlink()
    install(python, root, torch)
    mark.write_text(wanted)
    return python


def read(arguments):
    """The options of this script, those of the training's that need no training, and all of the training's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--no-venv', action='store_true')
    parser.add_argument('--torch', choices=('auto', 'cpu', 'pypi'), default='auto')
    own, arguments = parser.parse_known_args(arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--config')
    parser.add_argument('--data', default='digits')
    parser.add_argument('-h', '--help', action='store_true')
    return own, parser.parse_known_args(arguments)[0], arguments


def check_arguments(known, venv=VENV, root=ROOT):
    """Answer --help, and stop at what cannot work, before anything is installed."""
    if known.help and not works(python_of(venv)):
        print(__doc__.strip())
        print('\nOnce the environment is installed, --help lists the options of `elsa train` as well.')
        sys.exit(0)
    recipe = known.config
    if recipe is not None and not Path(recipe).is_file() and not (root / 'configs' / f'{recipe}.yaml').is_file():
        sys.exit(f'error: --config: got {recipe!r}, no such file, and no recipe of that name')
    is_name = known.config is not None and '/' in known.data  # a recipe may use a data set by its name in timm
    if known.data != 'digits' and not Path(known.data).is_dir() and not is_name:
        sys.exit(f'error: --data: got {known.data!r}, must be a folder with one sub-folder of images for each class')


def main():
    """Prepare the environment and become the training."""
    own, known, arguments = read(sys.argv[1:])
    check_python(needs_venv=not own.no_venv)
    check_arguments(known)
    python = Path(sys.executable)
    try:
        if own.no_venv:
            install(python, ROOT, own.torch)
        else:
            python = prepare(torch=own.torch)
    except subprocess.CalledProcessError as e:
        sys.exit(f'error: {e.cmd[1:4]} failed, see above. Run the script again to take up where it stopped.')
    except KeyboardInterrupt:
        sys.exit('interrupted; run the script again to take up where it stopped.')
    command = [str(python), '-m', 'elsa_models', 'quickstart', *arguments]
    sys.stdout.flush()
    if os.name == 'nt':  # there, exec would return to the shell at once
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


if __name__ == '__main__':
    main()
