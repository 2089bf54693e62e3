"""Checkpoints that are whole or not there: the newest few, and the best weights.

timm's saver unlinks the last checkpoint before it puts the next in its place, and counts in epochs; a run that may be
killed at any moment and goes on within an epoch needs more.
"""
import logging
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch

from .._files import OutputError

_logger = logging.getLogger(__name__)


def save_atomically(value: Any, path: Union[str, Path]) -> None:
    """`torch.save` to a temporary file beside `path`, which takes its place once it is on the disk.

    Raises:
        OutputError: The disk is full or fails; a former file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == 'posix':  # the new name, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as e:  # torch reports a short write as RuntimeError
        temporary.unlink(missing_ok=True)
        raise OutputError(f'{path}: cannot be written ({e}). Former checkpoints are as they were.') from e


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

    def files(self) -> List[Path]:
        """The checkpoints there are, the newest first."""
        return sorted(self.folder.glob('step-*.pt'), reverse=True)

    def save(self, step: int, state: Dict[str, Any]) -> None:
        """Write a checkpoint, then remove those beyond the newest.

        Raises:
            OutputError: It cannot be written; those before are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        save_atomically(state, self.folder / f'step-{step:010d}.pt')
        for file in self.files()[self.keep:]:
            file.unlink()

    def save_best(self, state: Dict[str, Any]) -> None:
        """Write the weights of the best epoch so far.

        Raises:
            OutputError: They cannot be written; those before are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        save_atomically(state, self.best)

    def load_best(self) -> Dict[str, Any]:
        """What was last given to `save_best`."""
        return torch.load(self.best, map_location='cpu', weights_only=True)

    def load_newest(self) -> Optional[Dict[str, Any]]:
        """The newest checkpoint that can be read, or None where there is none at all.

        Raises:
            OutputError: There are some, but none can be read.
        """
        for file in self.files():
            try:
                return torch.load(file, map_location='cpu', weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
                _logger.warning('%s: cannot be read (%s); going back to the one before.', file, e)
        if self.files():
            raise OutputError(
                f'{self.folder}: none of its checkpoints can be read. Start afresh with resume: false (--no-resume).')
        return None
