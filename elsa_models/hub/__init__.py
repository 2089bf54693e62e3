"""Weights: where `pretrained=True` finds them, and the cache of released ones.

Importing the package makes this what the models ask. The way from a checkpoint to a hub is in `elsa_models.hub.convert`
and `elsa_models.hub.publish`.
"""
from .._files import OutputError
from ..models._checkpoint import WeightsError
from .cache import cache_root, cached_weights
from .resolve import find_weights, get_hub_namespace, load_weights, set_hub_namespace

__all__ = [
    'OutputError', 'WeightsError', 'cache_root', 'cached_weights', 'find_weights', 'get_hub_namespace', 'load_weights',
    'set_hub_namespace',
]
