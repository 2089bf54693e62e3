"""Checkpoints that are whole or not there: the newest few, and the best weights.

timm's saver unlinks the last checkpoint before it puts the next in its place, and counts in epochs; a run that may be
killed at any moment and goes on within an epoch needs more.
"""
import logging
import zipfile
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Union

import torch

from .._files import OutputError, remove, whole_file

_logger = logging.getLogger(__name__)


def _save(value: Any, path: Path) -> None:
    try:
        with whole_file(path) as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as e:  # torch reports a short write as RuntimeError
        why = 'its folder has been moved or removed' if not path.parent.is_dir() else e
        raise OutputError(f'{path}: cannot be written ({why}). Former checkpoints are as they were.') from e


def _load(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch writes checksums, and reads without comparing them
    if damaged is not None:
        raise ValueError(f'{damaged} in it is not what was written')
    return torch.load(path, map_location='cpu', weights_only=True)


class Checkpoints:
    """The checkpoints of a run in a folder: one file for each, named by the step."""

    def __init__(self, folder: Union[str, Path], keep: int) -> None:
        """
        Args:
            folder: Folder of the checkpoints.
            keep: Newest checkpoints to keep.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.best = self.folder / 'best.pt'

    def create_folder(self) -> None:
        """Make the folder, and remove what a process that was killed has left in it half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob('.*'):
            remove(path)

    def files(self) -> List[Path]:
        """The checkpoints there are, the newest first."""
        return sorted(self.folder.glob('step-*.pt'), reverse=True)

    def save(self, step: int, state: Dict[str, Any]) -> None:
        """Write a checkpoint, then remove those beyond the newest.

        Raises:
            OutputError: It cannot be written; those before are as they were.
        """
        _save(state, self.folder / f'step-{step:010d}.pt')
        for file in self.files()[self.keep:]:
            file.unlink()

    def save_best(self, state: Dict[str, Any]) -> None:
        """Write the weights of the best epoch so far.

        Raises:
            OutputError: They cannot be written; those before are as they were.
        """
        _save(state, self.best)

    def load_best(self) -> Dict[str, Any]:
        """What was last given to `save_best`.

        Raises:
            OutputError: It cannot be read.
        """
        try:
            return _load(self.best)
        except Exception as e:  # damaged files make torch raise nearly anything
            raise OutputError(
                f'{self.best}: cannot be read ({type(e).__name__}: {e}). Remove it and the newest'
                f' {self.folder.name}/step-*.pt, and the run goes on from the one before.') from e

    def load_newest(self, names: Collection[str] = ()) -> Optional[Dict[str, Any]]:
        """The newest checkpoint that can be read, or None where there is none at all.

        Args:
            names: Entries that it must have.

        Raises:
            OutputError: There are some, but none can be read.
        """
        for file in self.files():
            try:
                state = _load(file)
                missing = sorted(set(names) - state.keys())
                if not missing:
                    return state
                reason = f'has no {missing[0]}'
            except Exception as e:  # damaged files make torch raise nearly anything
                reason = f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else "no reason given"}'
            _logger.warning('%s: cannot be read (%s); going back to the one before.', file, reason[:200])
        if self.files():
            raise OutputError(
                f'{self.folder}: none of its checkpoints can be read. Start afresh with resume: false (--no-resume).')
        return None
