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

# each of these needs weights (the first one also stored outputs) from a hub, which a test of the architecture has not
_NEEDS_WEIGHTS = ('test_model_inference', 'test_model_load_pretrained', 'test_model_features_pretrained')

_TOKENS = 'vit_*'  # in timm's list of models whose features are tokens

_list_models = timm.list_models


def _is_selected(name):
    name = name.partition('.')[0]
    patterns = os.environ.get('ELSA_PEER_MODELS', '*').split()
    is_own = model_entrypoint(name).__module__.partition('.')[0] == elsa_models.__name__
    return is_own and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _has_tokens(name):
    # tokens are no maps, and timm has a test of its own for them
    return timm.get_pretrained_cfg_value(name.partition('.')[0], 'pool_size') is None


def list_models(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
    """`timm.list_models()` for the selected models of this package.

    timm's test file lists by name and module which models lack what. Ours lack nothing, so one of these lists counts
    alone, that of models whose features are tokens. It is known by an entry of it, and such models by their cfg.
    """
    names = [n for n in _list_models(pretrained=pretrained, **kwargs) if _is_selected(n)]
    if filter and _TOKENS not in filter:
        named = set(_list_models(filter=filter, pretrained=pretrained, **kwargs))
        names = [n for n in names if n in named]
    if _TOKENS in filter:
        names = [n for n in names if _has_tokens(n)]
    if _TOKENS in exclude_filters:
        names = [n for n in names if not _has_tokens(n)]
    return names


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
