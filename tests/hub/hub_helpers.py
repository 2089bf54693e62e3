"""What the tests of the hub share: loading as a user would, and looking into caches."""
from pathlib import Path

import released
import safetensors.torch
import timm
import torch
from huggingface_hub import constants


def point_to(monkeypatch, url):
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')


def load(name=released.NAME, **kwargs):
    """`pretrained=True` as a user would ask for it."""
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def assert_right(model, weights):
    expected = weights.state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for k, x in actual.items():
        assert torch.equal(x, expected[k]), k


def cache_files(home):
    """Names of the files of our cache, locks left out."""
    root = Path(home) / 'elsa_models'
    return sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.is_file() and p.name != '.lock')


def complete_files(home):
    """Every file of weights that any cache holds under a final name."""
    return [p for p in Path(home).rglob('*') if p.is_file() and p.stat().st_size > 10000 and not p.name.endswith(
        ('.part', '.incomplete')) and not p.name.startswith('.')]


def state_of(path):
    return safetensors.torch.load_file(path)
