"""Families of models, as they declare themselves to code that knows none by name."""
import inspect
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Set, Tuple, Type, Union

import timm
import torch
import torch.nn as nn

StateDict = Dict[str, torch.Tensor]


def _as_it_is(state_dict: StateDict) -> StateDict:
    return dict(state_dict)


def _never(state_dict: StateDict) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """What the models of one file have in common. Their entry points are those that `timm.register_model` has there.

    Attributes:
        name: Of the family.
        module: `__name__` of the file.
        model_cls: Class of the models.
        filter_fn: Fits a checkpoint to a model, as timm's `checkpoint_filter_fn`; if None, one that resamples positions
            and requires all entries but the classifiers', see `_checkpoint.filter_of`.
        to_own_names: Gives a state dict, of ours or whomever's, the names and layout of the models. Entries are
            renamed, dropped, split, joined and reordered; nothing is computed.
        is_authors: Whether a state dict is in the format of the authors' release, whose licence it then has.
        relatives: Names of timm's weights from which an entry point can start, where it has none of its own.
        marks: Ends of names in an attention, such as 'attn_conv.weight'. Where either the model or a relative has them
            and the other has not, the two attentions share nothing, whatever their names.
        silenced: Pattern of parameters that a start from weights without them sets to zero, so that the model begins as
            the relative; None for none.
        first_conv: Convolution that takes the images.
        classifiers: Modules whose shapes depend on the number of classes.
        top1: Published accuracy of entry points on ImageNet-1k at their input size, in percent.
        dense_args: Arguments of the models as backbones of detectors and segmenters, beside dynamic_img_size.
        reads_dense: Whether the authors released detectors or segmenters with such a backbone.
    """
    name: str
    module: str
    model_cls: Type[nn.Module]
    filter_fn: Optional[Callable[[Dict[str, Any], Any], StateDict]] = None
    to_own_names: Callable[[StateDict], StateDict] = _as_it_is
    is_authors: Callable[[StateDict], bool] = _never
    relatives: Mapping[str, str] = field(default_factory=dict)
    marks: Tuple[str, ...] = ()
    silenced: Optional[str] = None
    first_conv: str = 'patch_embed.proj'
    classifiers: Tuple[str, ...] = ('head.fc',)
    top1: Mapping[str, float] = field(default_factory=dict)
    dense_args: Mapping[str, Any] = field(default_factory=dict)
    reads_dense: bool = False

    @property
    def model_names(self) -> Tuple[str, ...]:
        """The family's entry points."""
        return tuple([n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__ == self.module])


def arguments_of(model_cls: Type[nn.Module]) -> Set[str]:
    """Names of a constructor's arguments, those included that `**kwargs` hand to the class it derives from."""
    names: Set[str] = set()
    for cls in model_cls.__mro__:
        parameters = inspect.signature(vars(cls)['__init__']).parameters.values() if '__init__' in vars(cls) else ()
        names.update(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if parameters and all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return names - {'self'}


_families: Dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known. One of the same name is replaced."""
    _families[family.name] = family
    return family


def families() -> Tuple[Family, ...]:
    """All families, in the order of their registration."""
    return tuple(_families.values())


def family_of(model: Union[str, nn.Module, Type[nn.Module]]) -> Optional[Family]:
    """The family of a model, of a class of models, or of an entry point by its name; None if it is not one of ours.

    An entry point in a file of no family, such as a user's, belongs to the family whose class it builds.
    """
    if isinstance(model, type):
        return next((f for cls in model.__mro__ for f in _families.values() if f.model_cls is cls), None)
    if isinstance(model, nn.Module):
        name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
        family = family_by_file(name) if name else None
        if family is not None and isinstance(model, family.model_cls):
            return family
        return family_of(type(model))
    name = model.partition('.')[0]
    if not timm.is_model(name) or timm.models.model_entrypoint(name).__module__.startswith('timm.'):
        return None
    return family_by_file(name) or family_of(timm.create_model(name, device='meta'))


def family_by_file(name: str) -> Optional[Family]:
    """The family in whose file an entry point is, if it is in one."""
    if not timm.is_model(name):
        return None
    module = timm.models.model_entrypoint(name).__module__
    return next((f for f in _families.values() if f.module == module), None)
