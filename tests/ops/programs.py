"""Programs that tests run in processes of their own."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 240

# operators alone: the whole package takes seconds to import
_OPERATORS = f'''
import sys, types
package = types.ModuleType('elsa_models')
package.__path__ = [{str(ROOT / 'elsa_models')!r}]
sys.modules['elsa_models'] = package
'''


def start(code, *arguments, folder=None, **environment):
    """Start a program that may import `elsa_models.ops`, from `folder` or the root of the repository."""
    path = os.pathsep.join(map(str, (folder, ROOT) if folder else (ROOT,)))
    return subprocess.Popen(
        [sys.executable, '-c', _OPERATORS + textwrap.dedent(code), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': path, **environment})


def finish(process):
    """What the program has written to both of its outputs, once it has ended well."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, f'{process.returncode}\n{out[-2000:]}\n{err[-4000:]}'
    return out, err


def run(code, *arguments, **options):
    """`start` and `finish`."""
    return finish(start(code, *arguments, **options))
