"""Reading checkpoint files, and building a model around one."""
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed_nhwc, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import build_model_with_cfg, clean_state_dict, load_state_dict
from timm.models._builder import resolve_pretrained_cfg

_NO_WEIGHTS = (
    'download the authors\' checkpoint (see README.md, Weights) and pass pretrained_cfg_overlay=dict(file=PATH)')
_WRAPPERS = ('state_dict', 'model')  # where training checkpoints keep their weights


def read_checkpoint(path: Union[str, Path], use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """Read the weights in a checkpoint file, safetensors or pickle, without running any code it may hold.

    Training checkpoints are unwrapped and the prefixes of DistributedDataParallel and torch.compile removed.

    Args:
        path: File to read.
        use_ema: Take the averaged weights where the checkpoint has them.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged, holds objects other than plain data and tensors, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {str(path)!r}: no such file.')
    try:
        state_dict = load_state_dict(str(path), use_ema=use_ema)
    except Exception as e:  # damaged files raise errors of many types
        raise RuntimeError(
            f'checkpoint {str(path)!r}: cannot be read ({type(e).__name__}: {e}). Is the download complete, and is '
            f'it a PyTorch or safetensors checkpoint of weights?') from e
    if not state_dict or not all(isinstance(x, torch.Tensor) for x in state_dict.values()):
        strange = [k for k, x in state_dict.items() if not isinstance(x, torch.Tensor)]
        raise RuntimeError(
            f'checkpoint {str(path)!r}: holds no state dict of tensors'
            f' ({"not tensors: " + ", ".join(map(str, strange)) if strange else "it is empty"}).')
    return state_dict


def unwrap(state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights of a state dict, or of a training checkpoint around one, without wrapper prefixes."""
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    return clean_state_dict(state_dict)


def fit_positions(name: str, x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Resample a patch embedding, position embedding or relative position table to the sizes of the model.

    Args:
        name: Name of the entry in the model.
        x: The entry, of any size.
        model: The model that is to be loaded.

    Returns:
        The entry in the model's size, or as it was if it is of another kind, unknown, or differs in more than size.
    """
    if name not in ('patch_embed.proj.weight', 'pos_embed') and not name.endswith('.relative_position_bias_table'):
        return x
    target = model.state_dict().get(name)
    if target is None or x.dim() != target.dim():
        return x
    if name == 'patch_embed.proj.weight':
        if x.shape[:2] == target.shape[:2] and x.shape != target.shape:
            return resample_patch_embed(x, list(target.shape[-2:]), verbose=True)
    elif name == 'pos_embed' and x.dim() == 4:
        if x.shape[-1] == target.shape[-1]:
            return resample_abs_pos_embed_nhwc(x, list(target.shape[1:3]), verbose=True)
    elif name.endswith('.relative_position_bias_table'):
        window_size = model.get_submodule(name.rpartition('.')[0]).window_size
        # tables of windows that are no squares can differ at equal shape
        if x.shape[1] == target.shape[1] and (x.shape != target.shape or window_size[0] != window_size[1]):
            return resize_rel_pos_bias_table(x, window_size, target.shape)
    return x


def check_keys(state_dict: Dict[str, Any], model: nn.Module, optional: Union[str, Tuple[str, ...]]) -> None:
    """Require that a state dict has the model's entries and no others.

    Args:
        state_dict: Entries in the model's names.
        model: The model to be loaded.
        optional: Prefixes of entries that may be missing or unknown (the classifiers).

    Raises:
        RuntimeError: Lists every missing and every unknown entry.
    """
    expected = model.state_dict().keys()
    missing = [k for k in expected if k not in state_dict and not k.startswith(optional)]
    unknown = [k for k in state_dict if k not in expected and not k.startswith(optional)]
    if missing or unknown:
        raise RuntimeError(
            f'checkpoint does not fit {type(model).__name__}.'
            f' Missing ({len(missing)}): {", ".join(missing) or "none"}.'
            f' Unknown ({len(unknown)}): {", ".join(unknown) or "none"}.')


def build_model(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        filter_fn: Optional[Callable] = None,
        no_weights: str = _NO_WEIGHTS,
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with checkpoint files read by `read_checkpoint`.

    Args:
        model_cls: Class of the model.
        variant: Name of the entry point.
        pretrained: Load weights.
        pretrained_cfg: As in `timm.create_model`.
        pretrained_cfg_overlay: As in `timm.create_model`; `use_ema=False` beside `file` passes over averaged weights.
        filter_fn: Fits a checkpoint to the model.
        no_weights: What to say and advise where no weights are known, without full stop.
        **kwargs: Further arguments of `build_model_with_cfg` and of the model.

    Raises:
        RuntimeError: Weights are asked for but none are known, or those found do not fit.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    use_ema = overlay.pop('use_ema', True)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    reads_file = pretrained and cfg.file and not cfg.state_dict and cfg.source not in ('hf-hub', 'local-dir')
    if reads_file:
        cfg = dataclasses.replace(cfg, state_dict=read_checkpoint(cfg.file, use_ema))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'{variant}: pretrained=True, but no weights are known for this model: {no_weights}, or use '
            f'pretrained=False.')
    # a registered model passes its tag as a string, an already resolved cfg as a dict of its fields
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg={f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)},
        pretrained_filter_fn=filter_fn,
        **kwargs,
    )
    if reads_file:
        model.pretrained_cfg.pop('state_dict', None)  # the model holds them; default_cfg is the same dict
    return model
