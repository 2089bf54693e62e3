"""pytest plugin: plant known faults in a model, to prove that the suite would notice them.

`ELSA_PEER_FAULTS` names the faults, separated by spaces, `ELSA_PEER_MODELS` the model. Load it after `peer_plugin`.
"""
import functools
import os

import timm
import torch
import torch.nn as nn

import elsa_models  # noqa: F401  registers the models


def plant_pool_default(cls):
    """`reset_classifier(n)` without a pool removes the pooling instead of keeping it."""
    reset_classifier = cls.reset_classifier

    @torch.jit.ignore
    def reset_classifier_with_pool_default(self, num_classes, global_pool=''):
        reset_classifier(self, num_classes, global_pool)

    cls.reset_classifier = reset_classifier_with_pool_default


def plant_idle_parameter(cls):
    """A parameter that no output depends on."""
    init = cls.__init__

    @functools.wraps(init)
    def init_with_idle_parameter(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.idle = nn.Parameter(torch.zeros_like(next(self.parameters())))

    cls.__init__ = init_with_idle_parameter


def plant_final_features(cls):
    """The final features of `forward_intermediates()` are one percent off those of `forward_features()`."""
    forward_intermediates = cls.forward_intermediates

    @functools.wraps(forward_intermediates)
    def forward_intermediates_off(self, *args, **kwargs):
        outputs = forward_intermediates(self, *args, **kwargs)
        if isinstance(outputs, tuple):
            outputs = (outputs[0] * 1.01, outputs[1])
        return outputs

    cls.forward_intermediates = forward_intermediates_off


FAULTS = {
    'pool_default': plant_pool_default,
    'idle_parameter': plant_idle_parameter,
    'final_features': plant_final_features,
}


def pytest_configure():
    cls = type(timm.create_model(os.environ['ELSA_PEER_MODELS'], device='meta'))
    for fault in os.environ['ELSA_PEER_FAULTS'].split():
        FAULTS[fault](cls)
