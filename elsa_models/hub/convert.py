"""From a checkpoint of one of our models, or of a relative, to a folder that plain timm reads."""
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn

from .._files import replace_folder
from ..models import Family, families, family_of, warm_start
from ..models._checkpoint import WeightsError, fit_weights, read_checkpoint, unwrap
from ..models._follow import follow
from ..models._naming import near_names
from ..models._saving import save_folder
from .cache import sha256_of
from .card import UNKNOWN, model_card
from .resolve import checkpoint_filter_of

KINDS = ('auto', 'weights', 'backbone', 'warm-start')
FILES = ('README.md', 'config.json', 'model.safetensors')  # of a converted folder
_BACKBONE = 'backbone.'  # prefix in checkpoints of detectors and segmenters
_ACTIONS = (
    'same', 'renamed', 'reshaped', 'transposed', 'reordered', 'split', 'joined', 'resized', 'dropped', 'missing')

StateDict = Dict[str, torch.Tensor]
Row = Tuple[str, Tuple[str, ...], Tuple[str, ...]]  # entry of the file, entries of the model, actions


@dataclass(frozen=True)
class KeyReport:
    """What became of each entry of a checkpoint, and of each entry of the model.

    `rows` are an entry of the file, entries of the model and what was done: 'same', 'renamed', 'reshaped' (other
    shape, same order of values), 'transposed' (matrices, whose rows may be reordered, too), 'reordered' (values in
    another order), 'split', 'joined' (with other entries), 'resized' (resampled), 'dropped' (no entries of the model),
    'missing' (no entry of the file).
    """
    rows: Tuple[Row, ...]

    def count(self, action: str) -> int:
        """Number of rows in which `action` was done."""
        return sum(action in actions for _, _, actions in self.rows)

    def __str__(self) -> str:
        lines = []
        for source, targets, actions in self.rows:
            arrow = f' -> {", ".join(targets)}' if targets and targets != (source,) else ''
            lines.append(f'{"+".join(actions):20} {source}{arrow}')
        counts = ', '.join(f'{n} {action}' for action in _ACTIONS if (n := self.count(action)))
        return '\n'.join([*lines, f'{len(lines)} entries: {counts}'])


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint, before it is saved."""
    model: nn.Module
    kind: str
    report: KeyReport
    summary: str  # where the weights are from, in words
    license: str
    label_names: Optional[List[str]] = None  # of the classes, where they are known


def _actions(x: torch.Tensor, targets: StateDict, key: str) -> List[str]:
    """What was done to an entry of a file, by the entries of the model that it went to. See `follow`."""
    actions = []
    if tuple(targets) != (key,):
        actions.append('split' if len(targets) > 1 else 'renamed')
    if len(targets) > 1:
        return actions
    places, = targets.values()
    order = torch.arange(x.numel(), dtype=places.dtype)
    if places.numel() != x.numel():
        actions.append('joined' if places.numel() > x.numel() else 'split')
    elif torch.equal(places, order.view(x.shape)):
        pass
    elif x.dim() == 2 and torch.equal(places.sort(dim=0).values, order.view(x.shape).t()):
        actions.append('transposed')
    else:
        actions.append('reshaped' if torch.equal(places.flatten(), order) else 'reordered')
    return actions


def _trace(found: StateDict, fitted: StateDict, model: nn.Module, family: Family) -> List[Row]:
    """What became of each entry of a file, and which entries of the model come from none."""
    renamed, rows, reached = family.to_own_names(found), [], set()
    for key, targets in follow(found, family.to_own_names).items():
        targets = {k: places for k, places in targets.items() if k in fitted}
        reached.update(targets)
        actions = _actions(found[key], targets, key) if targets else ['dropped']
        if any(renamed[k].shape != fitted[k].shape or not torch.equal(renamed[k], fitted[k]) for k in targets):
            actions.append('resized')
        rows.append((key, tuple(targets), tuple(actions) or ('same',)))
    rows += [('-', (k,), ('missing',)) for k in model.state_dict() if k not in reached]
    return rows


def _take_backbone(state_dict: StateDict) -> Dict[str, str]:
    """Names of the entries of a classifier without head that are inside a detector or segmenter, and theirs there.

    The last of its four norms, one for each output, is on the same map as the norm of a classifier.
    """
    prefix = _BACKBONE if any(k.startswith(_BACKBONE) for k in state_dict) else ''
    names = {k[len(prefix):]: k for k in state_dict if k.startswith(prefix)}
    names = {k: name for k, name in names.items() if not k.startswith(('norm0.', 'norm1.', 'norm2.', 'head.'))}
    return {f'norm.{k[len("norm3."):]}' if k.startswith('norm3.') else k: name for k, name in names.items()}


def _in_own_names(state_dict: StateDict, family: Family) -> StateDict:
    try:
        return family.to_own_names(state_dict)
    except Exception:  # of entries of the right names and strange shapes; `fit_weights` says what is wrong with them
        return state_dict


def _guess_kind(state_dict: StateDict, family: Family, architecture: str, model_args: Dict[str, Any]) -> str:
    if any(k.startswith((_BACKBONE, 'norm3.')) for k in state_dict):
        return 'backbone'
    marks = tuple(f'.{m}' for m in family.marks)
    if not marks or any(f.is_authors(state_dict) for f in families()) or any(k.endswith(marks) for k in state_dict):
        return 'weights'
    found = _in_own_names(state_dict, family)
    expected = timm.create_model(architecture, device='meta', **{**model_args, 'num_classes': 0}).state_dict()
    return 'weights' if all(k in found for k in expected) else 'warm-start'


def _num_classes(state_dict: StateDict, family: Family) -> int:
    found = _in_own_names(state_dict, family)
    for classifier in family.classifiers:
        x = found.get(f'{classifier}.weight')
        if x is not None and x.dim() == 2:
            return x.shape[0]
    return 0


def convert(
        path: Union[str, Path],
        architecture: str,
        kind: str = 'auto',
        use_ema: bool = True,
        model_args: Optional[Dict[str, Any]] = None,
) -> Conversion:
    """Read a checkpoint into a model of this package.

    Args:
        path: File of the authors' or our training, classification, detection or segmentation; or of a relative in
            timm, of which what is shared is copied.
        architecture: Name of the entry point.
        kind: 'weights' are those of the whole classifier, 'backbone' is that inside a detector or segmenter,
            'warm-start' is a relative; 'auto' decides by the names of the entries.
        use_ema: Take the averaged weights where the checkpoint has them.
        model_args: Further arguments of the model.

    Raises:
        ValueError: The architecture or the kind is unknown.
        FileNotFoundError: There is no such file.
        WeightsError: The file cannot be read or does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f'kind: got {kind!r}, must be one of {", ".join(KINDS)}.')
    path, model_args = Path(path), dict(model_args or {})
    family = family_of(architecture)
    if family is None:
        known = ', '.join(name for f in families() for name in f.model_names)
        raise ValueError(f'architecture: got {architecture!r}, must be one of {known}.{near_names(architecture)}')
    found = unwrap(read_checkpoint(path, use_ema))
    if kind == 'auto':
        kind = _guess_kind(found, family, architecture, model_args)
    if kind == 'warm-start':
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(architecture, **model_args)
        try:
            report = warm_start(model, path, use_ema)
        except (ValueError, RuntimeError) as e:
            raise WeightsError(f'{path}: {e}') from e
        rows = [(k, (k,), ('same',)) for k in report.copied]
        rows += [(k, (k,), ('resized',)) for k in report.resized]
        rows += [(k, (), ('dropped',)) for k in report.unused]
        rows += [('-', (k,), ('missing',)) for k in (*report.left, *report.silenced)]
        share = 100. * (report.num_copied + report.num_resized) / report.num_params
        summary = (
            f'A start for training, and no trained model: {share:.0f} % of the parameters are those of a related model,'
            f' the others {"are zero or " if report.silenced else ""}have their initial values.')
        return Conversion(model, kind, KeyReport(tuple(rows)), summary, UNKNOWN)
    names = {k: k for k in found}
    if kind == 'backbone':
        names = _take_backbone(found)
        summary = 'The backbone of a detection or segmentation model, without classifier.'
    elif family.is_authors(found):
        summary = 'From a checkpoint of the authors\' training code.'
    else:
        summary = 'From a checkpoint of a training with this package.'
    taken = {k: found[name] for k, name in names.items()}
    model_args.setdefault('num_classes', 0 if kind == 'backbone' else _num_classes(taken, family))
    meta = timm.create_model(architecture, device='meta', **model_args)
    if kind == 'backbone' and not family.reads_dense:
        raise WeightsError(f'{path}: has the entries of a backbone with four norms, which {architecture} is not.')
    fitted = fit_weights(taken, meta, checkpoint_filter_of(meta))
    rows = _trace(taken, fitted, meta, family)
    rows = [_with_original_name(row, names) for row in rows]
    kept = set(names.values())
    rows += [(k, (), ('dropped',)) for k in found if k not in kept]
    model = meta.to_empty(device='cpu')  # without drawing weights that are overwritten at once
    if hasattr(model, 'init_non_persistent_buffers'):
        model.init_non_persistent_buffers()
    model.load_state_dict(fitted)
    license = timm.get_pretrained_cfg(architecture).license if family.is_authors(taken) else UNKNOWN
    return Conversion(model, kind, KeyReport(tuple(rows)), summary, license, _label_names(path, model.num_classes))


def _label_names(path: Path, num_classes: int) -> Optional[List[str]]:
    """Names of the classes from the config.json beside a file, where training with this package has left one."""
    try:
        names = json.loads(path.with_name('config.json').read_text(encoding='utf-8'))['label_names']
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_list = isinstance(names, list) and len(names) == num_classes and all(isinstance(n, str) for n in names)
    return names if is_list else None


def _with_original_name(row: Row, names: Dict[str, str]) -> Row:
    key, targets, actions = row
    original = names.get(key, key)
    if original == key or not targets:
        return original, targets, actions
    return original, targets, tuple(dict.fromkeys(['renamed', *(a for a in actions if a != 'same')]))


def save(
        conversion: Conversion,
        folder: Union[str, Path],
        source: Union[str, Path],
        name: Optional[str] = None,
        tag: Optional[str] = None,
        license: Optional[str] = None,
) -> Path:
    """Save a conversion as model.safetensors, config.json and README.md, all of them or none.

    Args:
        conversion: What `convert` returned.
        folder: Created, or replaced if it holds nothing else than such files.
        source: The file that was converted.
        name: Of the model in its card; that of the folder if None.
        tag: What the weights were trained by and on, as in `damo_in1k`.
        license: Of the weights; if None, that of the authors for theirs, and unknown for others.

    Raises:
        OutputError: The folder holds something else.
    """
    folder = Path(folder).absolute()
    model = conversion.model
    license = license or conversion.license
    model_config = dict(pretrained_cfg=dict(tag=tag, license=license))
    if conversion.license == UNKNOWN:
        model_config['pretrained_cfg']['origin_url'] = None  # that of the authors' weights
    if conversion.label_names is not None:
        model_config['label_names'] = conversion.label_names
    if conversion.kind == 'warm-start':
        model_config['pretrained_cfg']['description'] = conversion.summary
    with replace_folder(folder, FILES) as temporary:
        save_folder(model, temporary, model_config)
        card = model_card(
            model,
            name or folder.name,
            conversion.summary,
            license,
            sha256_of(temporary / 'model.safetensors'),
            source=f'converted from | a file with sha256 `{sha256_of(source)}`',
            of_authors=conversion.license != UNKNOWN,
        )
        (temporary / 'README.md').write_text(card, encoding='utf-8')
        check_folder(temporary)
    return folder


def check_folder(folder: Union[str, Path]) -> Dict[str, Any]:
    """Require that a folder is what `save` or a training writes, and that its weights load by plain timm.

    Returns:
        The content of config.json.

    Raises:
        WeightsError: A file is missing, is of another kind, or does not fit the others.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise WeightsError(
                f'{folder}: has no file {name}. `elsa convert` and `elsa train` make such folders.')
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        architecture = config['architecture']
        is_own = family_of(architecture) is not None
    except Exception as e:  # json can hold anything
        raise WeightsError(f'{folder / "config.json"}: cannot be read ({type(e).__name__}: {e}).') from e
    if not is_own:
        raise WeightsError(f'{folder / "config.json"}: the architecture {architecture!r} is not one of this package.')
    head = (folder / 'README.md').read_text(encoding='utf-8').splitlines()[:20]
    if not any('import elsa_models' in line for line in head):
        raise WeightsError(f'{folder / "README.md"}: must say `import elsa_models` in its first lines.')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # nothing is kept: the model is there to be compared with
            timm.create_model(f'local-dir:{folder}', pretrained=True, device='meta')
    except WeightsError:
        raise
    except Exception as e:  # of timm, on what config.json holds
        raise WeightsError(f'{folder}: cannot be loaded ({type(e).__name__}: {e}).') from e
    return config
