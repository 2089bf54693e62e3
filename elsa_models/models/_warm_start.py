"""Weights of related models as a start, for models that have none of their own."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models import adapt_input_conv

from ._checkpoint import WeightsError, explain_download, fit_positions, reaching_hub, read_checkpoint, unwrap
from ._family import family_of
from ._naming import ModelError, find_model, near_names

_SCHEMES = ('hf-hub:', 'hf_hub:', 'local-dir:')
_FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.tar', '.ckpt')


@dataclass(frozen=True)
class WarmStartReport:
    """What `warm_start` did with each entry of the model's state dict.

    Each of the four groups maps names to numbers of parameters; buffers have none.
    """
    source: str
    copied: Dict[str, int]  # equal to the source's
    resized: Dict[str, int]  # resampled to other sizes, or adapted to other image channels
    left: Dict[str, int]  # at their value before
    unused: Tuple[str, ...]  # entries of the source that went nowhere
    silenced: Dict[str, int] = field(default_factory=dict)  # set to zero, so that the model begins as the source

    @property
    def num_copied(self) -> int:
        """Parameters that were copied."""
        return sum(self.copied.values())

    @property
    def num_resized(self) -> int:
        """Parameters that were copied from another size."""
        return sum(self.resized.values())

    @property
    def num_left(self) -> int:
        """Parameters that were left as they were."""
        return sum(self.left.values())

    @property
    def num_silenced(self) -> int:
        """Parameters that were set to zero."""
        return sum(self.silenced.values())

    @property
    def num_params(self) -> int:
        """All parameters of the model."""
        return self.num_copied + self.num_resized + self.num_left + self.num_silenced

    def __str__(self) -> str:
        total = self.num_params
        lines = [f'warm start from {self.source}: {total:,} parameters']
        groups = {'copied': self.copied, 'resized': self.resized, 'zeroed': self.silenced, 'left': self.left}
        for group, entries in groups.items():
            if group == 'zeroed' and not entries:  # few families have any
                continue
            num = sum(entries.values())
            line = f'  {group:8}{num:>13,}  {100. * num / max(total, 1):5.1f} %  {len(entries)} entries'
            if entries and group != 'copied':
                line += ': ' + ', '.join(self._topmost(entries))
            lines.append(line)
        lines.append(f'  {len(self.unused)} entries of the source have no place in the model')
        return '\n'.join(lines)

    def _topmost(self, entries: Dict[str, int]) -> Iterable[str]:
        """The names of entries, with modules in place of what is all of their entries."""
        groups = (self.copied, self.resized, self.left, self.silenced)
        others = [n for g in groups if g is not entries for n in g]
        names: Dict[str, None] = {}
        for name in entries:
            parts = name.split('.')
            prefixes = ['.'.join(parts[:i]) for i in range(1, len(parts))]
            names[next((p for p in prefixes if not any(n.startswith(p + '.') for n in others)), name)] = None
        return names


def _read_source(source: Union[str, Path, nn.Module], use_ema: bool) -> Tuple[str, Dict[str, torch.Tensor]]:
    """Name and state dict of a source.

    Raises:
        ValueError: The source is nothing that is known.
        TypeError: The source is of another type.
        WeightsError: It could not be downloaded or read.
    """
    if isinstance(source, nn.Module):
        return type(source).__name__, unwrap(source.state_dict())
    if not isinstance(source, (str, Path)):
        raise TypeError(f'source: got {type(source).__name__}, must be a name, a path or a module.')
    name = str(source)
    if Path(source).is_file():
        return name, read_checkpoint(source, use_ema)
    created = name
    if Path(name.removeprefix('local-dir:')).is_dir():
        try:
            found = find_model(name)
        except ModelError as e:
            raise ValueError(f'source: {e}') from e
        if found.checkpoint is not None:
            return name, read_checkpoint(found.checkpoint, use_ema)
        created = found.name or name
    if created.startswith(_SCHEMES) or timm.is_model(created.partition('.')[0]):
        try:
            # what the source's constructor draws is nobody's business
            with torch.random.fork_rng(devices=[]), reaching_hub():
                return name, timm.create_model(created, pretrained=True).state_dict()
        except WeightsError:
            raise
        except Exception as e:  # of httpx2, of huggingface_hub, of timm, of the operating system
            raise WeightsError(f'source: {name!r} could not be had. {explain_download(e)}'.rstrip('.') + '.') from e
    if not isinstance(source, Path) and not name.endswith(_FILE_SUFFIXES):
        raise ValueError(
            f'source: got {name!r}, which is neither a file nor a model of timm. Must be a timm model name such as '
            f'\'volo_d1_224.sail_in1k\', \'hf-hub:owner/model\', \'local-dir:folder\', the path of a run, a saved '
            f'folder or a checkpoint, or a module.{near_names(name)}')
    return name, read_checkpoint(source, use_ema)


def _marked(state_dict: Dict[str, Any], marks: Tuple[str, ...]) -> Set[Tuple[str, str]]:
    """Modules, with a dot behind them, that have entries of which a family's attention is known; and those marks."""
    return {(k[:-len(m)], m) for k in state_dict for m in marks if k.endswith('.' + m)}


def _check_family(label: str, source: Dict[str, Any], model: nn.Module, replaced: Tuple[str, ...]) -> None:
    """Require that the source's modules are of the model's kinds, where both have a module of that name."""
    modules = dict(model.named_modules())
    known = model.state_dict().keys()
    for name in source:
        if name in known or name.startswith(replaced):
            continue
        prefix = name.rpartition('.')[0]
        while prefix not in modules:
            prefix = prefix.rpartition('.')[0]
        module = modules[prefix]
        if module is not model and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.Identity)):
            raise ValueError(
                f'source: {label!r} is of another family, it has {name!r} where {type(model).__name__} has a '
                f'{type(module).__name__} without.')


def warm_start(
        model: nn.Module,
        source: Union[str, Path, nn.Module],
        use_ema: bool = True,
) -> WarmStartReport:
    """Copy what a related model shares with one of ours: Swin with ELSA-Swin, for example, or another of ours.

    Shared are entries of the same name and shape. Position embeddings, relative position tables and patch embeddings
    of other sizes are resampled, a first convolution for other image channels is adapted. Attention of another kind is
    left at its initial value with all its parts, and so are classifiers for other numbers of classes. Parts that the
    model adds to its relative's may be set to zero, where their family says so: it then begins as the relative.

    Whatever is raised, the model is as it was.

    Args:
        model: A model of this package; feature extractors have to be made from the model afterwards.
        source: Name of a timm model, with tag, whose pretrained weights are downloaded; a `hf-hub:` or `local-dir:`
            name; the path of a run's folder, of a saved folder or of a checkpoint; or a module.
        use_ema: Take the averaged weights where a checkpoint file has them.

    Returns:
        What was copied, resized and left. Printable.

    Raises:
        ValueError: The source is unknown, of another family or width, or model or source hold no values (meta device).
        TypeError: The model or the source is of another type.
        FileNotFoundError: There is no such file.
        WeightsError: The file cannot be read, or the weights of the name could not be downloaded.
    """
    family = family_of(model)
    if family is None:
        raise TypeError(
            f'model: got {type(model).__name__}, must be a model of this package. For features, warm-start the '
            f'classifier, save it, and create the feature extractor from the file.')
    label, found = _read_source(source, use_ema)
    found = family.to_own_names(found)
    own = model.state_dict()
    for argument, state_dict in (('model', own), ('source', found)):
        if any(x.is_meta for x in state_dict.values()):
            raise ValueError(f'{argument}: is on the meta device, which holds no values. Create it on another device.')

    # attentions of which only one side has the marks share names, but nothing that has the same meaning
    replaced = tuple({p for p, _ in _marked(own, family.marks) ^ _marked(found, family.marks)})
    entries: Dict[str, torch.Tensor] = {}
    resized: Set[str] = set()
    for name, target in own.items():
        if name not in found or name.startswith(replaced):
            continue
        original = x = found[name]
        if name == f'{family.first_conv}.weight' and x.dim() == target.dim() and x.shape[1] != target.shape[1]:
            x = adapt_input_conv(target.shape[1], x, base_chans=x.shape[1])
        x = fit_positions(name, x, model)
        if x.shape == target.shape:
            entries[name] = x
            if x is not original:
                resized.add(name)

    feature_info: Any = model.feature_info
    stages = feature_info[0]['module'].partition('.')[0] + '.'
    if not any(name.startswith(stages) for name in entries):
        different = [k for k in own if k in found and k.startswith(stages) and not k.startswith(replaced)]
        reason = f'none of its entries is named {stages}*, as in {type(model).__name__}'
        if different:
            k = different[0]
            reason = f'{k!r} has shape {tuple(found[k].shape)} there and {tuple(own[k].shape)} in the model'
        raise ValueError(f'source: {label!r} has nothing in common with the stages of the model: {reason}.')
    _check_family(label, found, model, replaced)
    silenced: Set[str] = set()
    if family.silenced is not None:
        silenced = {k for k in own if k not in found and re.search(family.silenced, k)}
        entries.update({k: torch.zeros_like(own[k]) for k in silenced})

    num_params = {name: 0 for name in own}
    num_params.update((name, p.numel()) for name, p in model.named_parameters())
    model.load_state_dict({**own, **entries})
    return WarmStartReport(
        source=label,
        copied={k: n for k, n in num_params.items() if k in entries and k not in resized and k not in silenced},
        resized={k: n for k, n in num_params.items() if k in resized},
        left={k: n for k, n in num_params.items() if k not in entries},
        unused=tuple(k for k in found if k not in entries),
        silenced={k: n for k, n in num_params.items() if k in silenced},
    )
