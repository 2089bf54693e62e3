"""What a run says while it lasts: a CSV, and TensorBoard."""
import csv
import io
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch

from .._extras import require
from .._files import OutputError, write_atomically


def write_csv(history: List[Dict[str, Any]], path: Union[str, Path]) -> None:
    """Write one row for each epoch; the columns are the keys of all rows.

    Raises:
        OutputError: The file cannot be written; a former one is as it was.
    """
    names = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator='\n')
    writer.writeheader()
    writer.writerows({k: f'{v:.8g}' if isinstance(v, float) else v for k, v in row.items()} for row in history)
    try:
        write_atomically(text.getvalue(), path)
    except OSError as e:
        raise OutputError(f'{path}: cannot be written ({e}).') from e


class TensorBoard:
    """Scalars, learning rate, throughput and inputs for TensorBoard, or nothing where it is off."""

    def __init__(self, folder: Optional[Union[str, Path]], step: int = 0) -> None:
        """
        Args:
            folder: Folder of the logs, None for off.
            step: What an earlier process has logged from this step on is dropped.
        """
        self._writer = None
        if folder is not None:
            require('tensorboard')
            self._writer = require('torch.utils.tensorboard').SummaryWriter(str(folder), purge_step=step)

    def scalars(self, values: Dict[str, float], step: int) -> None:
        """Log numbers by name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def images(self, images: Optional[torch.Tensor], step: int) -> None:
        """Log a grid of images (N, C, H, W) between 0 and 1."""
        if self._writer is not None and images is not None:
            grid = require('torchvision.utils').make_grid(images[:64].float().cpu(), nrow=8)
            self._writer.add_image('inputs', grid, step)

    @property
    def on(self) -> bool:
        """Whether anything is logged."""
        return self._writer is not None

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
