"""Detectors and segmenters as files: weights beside what builds the model."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import safetensors.torch
import torch.nn as nn

from ..models._checkpoint import WeightsError, read_checkpoint

_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'


def save_model(model: nn.Module, folder: Union[str, Path], config: Dict[str, Any]) -> None:
    """Save weights as safetensors beside a config.json that says how to build the model.

    Args:
        model: Model to save.
        folder: Folder to create.
        config: What the model's builder takes, of plain values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    weights = {k: x.detach().cpu().contiguous() for k, x in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / _WEIGHTS, metadata=dict(format='pt'))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding='utf-8')


def load_model(
        folder: Union[str, Path],
        task: str,
        build: Callable[[Dict[str, Any]], nn.Module],
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Load what `save_model` has written.

    Args:
        folder: Folder of a run, or of its model, with `local-dir:` before it or not; or a checkpoint of a finished run.
        task: What 'task' must be in its config.
        build: Makes the model from its config, without weights.

    Returns:
        The model in evaluation mode, on the CPU, and its config.

    Raises:
        WeightsError: There is no such model, it is of another task, or files do not fit each other.
    """
    path = Path(str(folder).removeprefix('local-dir:'))
    folder, weights = _find(path)
    try:
        config: Optional[Dict[str, Any]] = json.loads((folder / _CONFIG).read_text(encoding='utf-8'))
        found = config.get('task')
    except (OSError, ValueError, AttributeError) as e:
        raise WeightsError(f'{folder}: has no readable {_CONFIG} ({e}).') from e
    if found != task:
        raise WeightsError(f'{folder}: is a model for {found!r}, must be for {task!r}.')
    try:
        model = build(config)
        model.load_state_dict(read_checkpoint(weights))
    except (LookupError, TypeError, ValueError, RuntimeError, OSError) as e:
        raise WeightsError(f'{folder}: cannot be loaded ({type(e).__name__}: {e}).') from e
    return model.eval(), config


def _find(path: Path) -> Tuple[Path, Path]:
    """The folder of a model's config, and the file of its weights, from whatever names it."""
    if path.is_file() and path.parent.name == 'checkpoints':
        return path.parents[1] / 'model', path
    folder = path.parent if path.name == _WEIGHTS else path
    if (folder / 'model' / _CONFIG).is_file():
        folder = folder / 'model'
    return folder, folder / _WEIGHTS
