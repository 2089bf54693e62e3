"""pytest plugin: point timm's own `tests/test_models.py` at the models of this package.

timm builds its parameter lists with `list_models()` while the test module is imported. This plugin is loaded before
that, registers our models and puts a narrower `list_models()` in timm's place. The test file itself stays as released.

`ELSA_PEER_MODELS` holds space separated wildcards for the model names, all models of the package by default.
"""
import fnmatch
import os

import timm
from timm.models import model_entrypoint

import elsa_models  # noqa: F401  registers the models

# filter lists of test_models.py, recognised by an entry of timm, and what a model of ours has to add to them.
# an outlooker stem and token features make VOLO `non-standard`, both families have forward_intermediates()
_FILTER_EXTENSIONS = {
    'volo_*': ['elsa_volo*', 'test_elsa_volo*'],
    'swin_transformer': ['elsa_swin', 'elsa_volo'],
}

# each of these needs weights (the first one also stored outputs) from a hub, which a test of the architecture has not
_NEEDS_WEIGHTS = ('test_model_inference', 'test_model_load_pretrained', 'test_model_features_pretrained')

_list_models = timm.list_models


def _extend(filters):
    filters = [filters] if isinstance(filters, str) else list(filters)
    filters = [f for f in filters if f]  # an empty one stands for no filter
    return filters + [own for key, names in _FILTER_EXTENSIONS.items() if key in filters for own in names]


def _is_selected(name):
    name = name.partition('.')[0]
    patterns = os.environ.get('ELSA_PEER_MODELS', '*').split()
    is_own = model_entrypoint(name).__module__.partition('.')[0] == elsa_models.__name__
    return is_own and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def list_models(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
    """`timm.list_models()` for the selected models of this package, and with timm's filter lists extended to them."""
    names = _list_models(
        filter=_extend(filter),
        module=_extend(module),
        pretrained=pretrained,
        exclude_filters=_extend(exclude_filters),
        **kwargs,
    )
    return [name for name in names if _is_selected(name)]


def list_pretrained(filter='', exclude_filters=''):
    """`timm.list_pretrained()` for the selected models of this package."""
    return list_models(filter=filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


def pytest_configure():
    timm.list_models = list_models
    timm.list_pretrained = list_pretrained


def pytest_collection_modifyitems(config, items):
    """Keep what timm parametrises over its registry, drop the tests of models that timm names one by one."""
    registered = set(list_models() + list_models(include_tags=True))
    selected, deselected = [], []
    for item in items:
        callspec = getattr(item, 'callspec', None)
        name = callspec.params.get('model_name') if callspec is not None else None
        keep = name in registered and item.originalname not in _NEEDS_WEIGHTS
        (selected if keep else deselected).append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = selected
