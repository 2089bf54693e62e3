"""Results of a study: a CSV file with a row for each run, to which several processes may add."""
import csv
import io
import logging
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Iterable, List

import torch
from filelock import FileLock

from .._files import write_atomically
from .._version import __version__

_logger = logging.getLogger(__name__)

COLUMNS = (
    'phase', 'reading', 'mixer', 'lr', 'seed', 'data', 'digest',  # which run, of which data
    'status',  # 'done' or 'diverged'
    'score', 'loss', 'train_loss',  # top-1 accuracy or mean IoU in percent, and losses, of the last epoch
    'weights',  # digest of all weights and buffers
    'mlp_ratio', 'steps', 'cpu_seconds', 'seconds', 'threads', 'device',
    'commit', 'elsa_models', 'torch', 'timm', 'numba', 'python', 'cpu',
)
SAME = ('status', 'score', 'loss', 'train_loss', 'weights')  # in a run made anew
_ROOT = Path(__file__).resolve().parents[2]
_CODE = ('elsa_models', 'configs/study')


class Results:
    """The rows of a file, which need not be there yet."""

    def __init__(self, path: Path, lock: Path) -> None:
        """
        Args:
            path: CSV file.
            lock: File that is locked while a row is added.
        """
        self.path, self._lock = path, lock

    def rows(self) -> List[Dict[str, str]]:
        """All rows, in the order in which they were added."""
        if not self.path.is_file():
            return []
        with open(self.path, encoding='utf-8', newline='') as file:
            return list(csv.DictReader(file))

    def add(self, rows: Iterable[Dict[str, Any]]) -> None:
        """Add rows; the file is whole at any time."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock):
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows([*self.rows(), *rows])
            write_atomically(text.getvalue(), self.path)

    def merge(self, other: Path) -> int:
        """Add the rows of another file that are not here yet, and return their number."""
        known = {tuple(row.values()) for row in self.rows()}
        new = [row for row in Results(other, self._lock).rows() if tuple(row.values()) not in known]
        if new:
            self.add(new)
        return len(new)


def environment() -> Dict[str, str]:
    """Code and versions on which the last bits of a run may depend."""
    try:
        numba = version('numba')
    except PackageNotFoundError:
        numba = ''
    backend = os.environ.get('ELSA_BACKEND', '')
    return dict(
        commit=_commit(),
        elsa_models=__version__ + (f'+{backend}' if backend else ''),
        torch=torch.__version__,
        timm=version('timm'),
        numba=numba,
        python=platform.python_version(),
        cpu=torch.backends.cpu.get_cpu_capability(),
    )


def _commit() -> str:
    """The commit of the code in a clone, with + where the code was changed; nothing where it is no clone."""
    def git(*args: str) -> str:
        return subprocess.run(
            ('git', '-C', str(_ROOT), *args), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git('rev-parse', '--short=12', 'HEAD') + ('+' if git('status', '--porcelain', '--', *_CODE) else '')
    except (OSError, subprocess.CalledProcessError):
        return ''
