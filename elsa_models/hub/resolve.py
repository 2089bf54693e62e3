"""What `pretrained=True` does: the cache, the hub repository of a namespace, the authors' file, or one error."""
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg
from timm.models._hub import hf_split

from ..models._checkpoint import WeightsError, filter_of, fit_weights, read_checkpoint, set_weights_finder
from ..models._family import family_of
from .cache import CacheEntry, cache_root, sha256_of
from .sources import (
    SourceError,
    download_from_drive,
    download_from_hub,
    download_from_web,
    drive_id,
    explain,
    reaching_hub,
)

_logger = logging.getLogger(__name__)

_NAMESPACE_VARIABLE = 'ELSA_HUB_NAMESPACE'
_namespace: Optional[str] = None


class _Attempt(NamedTuple):
    source: str
    reason: str
    fix: str = ''


def set_hub_namespace(namespace: Optional[str]) -> None:
    """Look for released weights in the hub repositories `<namespace>/<name>.<tag>`, before the authors' own files.

    Args:
        namespace: User or organisation on the hub, '' for none; None leaves it to the environment variable
            `ELSA_HUB_NAMESPACE`, which is unset by default.

    Raises:
        ValueError: It is no name.
    """
    global _namespace
    if namespace and not re.fullmatch(r'[\w.-]+', namespace):
        raise ValueError(f'namespace: got {namespace!r}, must be the name of a user or an organisation on the hub.')
    _namespace = namespace


def get_hub_namespace() -> str:
    """The namespace in force, '' if there is none. See `set_hub_namespace`."""
    return os.environ.get(_NAMESPACE_VARIABLE, '') if _namespace is None else _namespace


def checkpoint_filter_of(model: nn.Module) -> Callable[[Dict[str, Any], nn.Module], Dict[str, torch.Tensor]]:
    """The function that fits checkpoints to models of this family.

    Raises:
        TypeError: It is no model of this package.
    """
    family = family_of(model)
    if family is None:
        raise TypeError(f'model: got {type(model).__name__}, must be a model of this package.')
    return filter_of(family)


def load_weights(model: nn.Module, path: Union[str, Path], use_ema: bool = True) -> None:
    """Load a checkpoint file into a model that exists, classifier included.

    Args:
        model: A model of this package.
        path: Any checkpoint that `pretrained_cfg_overlay=dict(file=...)` takes.
        use_ema: Take the averaged weights where the checkpoint has them.

    Raises:
        TypeError: The model is of another type.
        FileNotFoundError: There is no such file.
        WeightsError: The file cannot be read or does not fit. The model is as it was.
    """
    filter_fn = checkpoint_filter_of(model)
    model.load_state_dict(fit_weights(read_checkpoint(path, use_ema), model, filter_fn))


def fit_to_architecture(path: Path, architecture: str, use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """The weights in a file in the names of an architecture, checked to be all of them.

    Raises:
        WeightsError: The file cannot be read or does not fit.
    """
    model = timm.create_model(architecture, device='meta')
    return fit_weights(read_checkpoint(path, use_ema), model, checkpoint_filter_of(model))


def _from_cache(entry: CacheEntry, tried: List[_Attempt]) -> Optional[Path]:
    try:
        path = entry.find()
    except WeightsError as e:
        tried.append(_Attempt('the cache', str(e)))
        _logger.warning('Cached weights will be replaced: %s', e)
        return None
    if path is None:
        tried.append(_Attempt('the cache', f'nothing in {entry.folder}'))
    return path


def _from_hub(entry: CacheEntry, name: str, architecture: str, cache_dir: Optional[Union[str, Path]]) -> Path:
    repo_id = f'{get_hub_namespace()}/{name}'
    path = download_from_hub(repo_id, cache_dir=cache_dir)
    tensors = fit_to_architecture(path, architecture)
    sha256 = sha256_of(path)
    if path.suffix == '.safetensors':
        return entry.add_file(path, sha256, repo_id)
    return entry.add_tensors(tensors, repo_id, sha256)


def _from_authors(entry: CacheEntry, url: str, architecture: str) -> Path:
    def download() -> Path:
        file_id = drive_id(url)
        return download_from_web(url, entry.partial) if file_id is None else download_from_drive(file_id, entry.partial)

    continued = entry.partial.is_dir()
    path = download()
    try:
        tensors = fit_to_architecture(path, architecture)
    except WeightsError:
        shutil.rmtree(entry.partial)  # complete but wrong: to continue it would be in vain
        if not continued:
            raise
        path = download()
        try:
            tensors = fit_to_architecture(path, architecture)
        except WeightsError:
            shutil.rmtree(entry.partial)
            raise
    return entry.add_tensors(tensors, url, sha256_of(path))


def _find_released(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> Path:
    """The file of a released weight, in our cache when it is found.

    Raises:
        WeightsError: Says what was tried, why each failed and what helps.
    """
    name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else str(cfg.architecture)
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise WeightsError(f'{name!r}: is no name of a model with a tag.')
    entry = CacheEntry(cache_root(cache_dir) / name)
    tried: List[_Attempt] = []
    if (path := _from_cache(entry, tried)) is not None:
        return path
    file_id = drive_id(cfg.url)
    namespace = get_hub_namespace()
    try:
        with entry.lock():
            tried.clear()
            if (path := _from_cache(entry, tried)) is not None:  # another process was faster
                return path
            entry.clean()
            if namespace:
                try:
                    return _from_hub(entry, name, cfg.architecture, cache_dir)
                except (WeightsError, OSError) as e:
                    error = explain(e)
                    tried.append(_Attempt(f'the hub repository {namespace}/{name}', error.reason, error.fix))
                    _logger.warning('%s is not to be had from the hub: %s', name, error.reason)
            else:
                tried.append(_Attempt('the hub', f'no namespace is set ({_NAMESPACE_VARIABLE})'))
            try:
                return _from_authors(entry, cfg.url, cfg.architecture)
            except (WeightsError, OSError) as e:
                error = explain(e)
                place = cfg.url if file_id is None else f'on Google Drive, {file_id}'
                tried.append(_Attempt(f'the authors\' file {place}', error.reason, error.fix))
    except OSError as e:
        error = explain(e)
        tried.append(_Attempt(f'to write in {entry.folder}', error.reason, error.fix))
    fixes = list(dict.fromkeys(a.fix for a in tried if a.fix))
    page = cfg.url if file_id is None else f'https://drive.google.com/file/d/{file_id}/view'
    fixes.append(
        f'download {page} in a browser, and timm.create_model('
        f'\'{cfg.architecture}\', pretrained=True, pretrained_cfg_overlay=dict(file=\'PATH\'))')
    raise WeightsError('\n'.join([
        f'{name}: pretrained=True, but the weights could not be had. Tried:',
        *(f'  {a.source}: {a.reason}' for a in tried),
        'What helps:',
        *(f'  {fix}' for fix in fixes),
    ]))


def _is_declared(cfg: PretrainedCfg) -> bool:
    """Whether the url of a cfg is the one that a family of ours has in its `default_cfgs`."""
    if not cfg.url or family_of(str(cfg.architecture)) is None:
        return False
    try:
        declared = timm.models.get_pretrained_cfg(f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture)
    except RuntimeError:  # a tag that nobody registered
        return False
    return declared is not None and declared.url == cfg.url


def find_weights(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> Optional[Path]:
    """The file that a cfg stands for, downloaded if need be: of a hub repository, or of a released weight.

    Args:
        cfg: With `hf_hub_id`, the url of a file on Google Drive, or the url that a family declares for the weight.
        cache_dir: As in `timm.create_model`.

    Returns:
        A path, or None if the cfg names none of them: other urls are timm's to download.

    Raises:
        WeightsError: It could not be had.
    """
    if cfg.source == 'hf-hub' or cfg.hf_hub_id:
        repo_id, revision = hf_split(cfg.hf_hub_id)
        try:
            return download_from_hub(repo_id, revision, cfg.hf_hub_filename, cache_dir)
        except SourceError as e:
            raise WeightsError(
                f'{cfg.hf_hub_id}: the weights could not be had from the hub ({e.reason}).'
                f'{" What helps: " + e.fix + "." if e.fix else ""}') from e
    if drive_id(cfg.url) is None and not _is_declared(cfg):
        return None
    return _find_released(cfg, cache_dir)


set_weights_finder(find_weights, explain, reaching_hub)
