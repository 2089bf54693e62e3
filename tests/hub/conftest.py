import os

import huggingface_hub
import pytest
import released
import timm
import torch
from helpers import to_authors
from hub_helpers import point_to
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars
from servers import DriveServer, HubServer, redirected_drive

import elsa_models


@pytest.fixture
def hub_server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def drive_server():
    server = DriveServer()
    with redirected_drive(server.url):
        yield server
    server.close()


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    """No test sees the caches, tokens, settings or network of the machine."""
    home = tmp_path / 'home'
    for name in list(os.environ):
        if name.startswith(('HF_', 'HUGGING', 'ELSA_')):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, 'HF_HOME', str(home))
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(home / 'hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(home / 'token'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    point_to(monkeypatch, 'http://127.0.0.1:9')  # where nobody listens
    disable_progress_bars()
    elsa_models.set_hub_namespace(None)
    yield home
    elsa_models.set_hub_namespace(None)
    huggingface_hub.close_session()


@pytest.fixture
def hub(hub_server, monkeypatch):
    """A hub that is the endpoint, with the namespace `org` in force."""
    point_to(monkeypatch, hub_server.url)
    elsa_models.set_hub_namespace('org')
    return hub_server


@pytest.fixture(scope='session')
def weights():
    """A model with random weights, and its image (1, 3, 32, 32)."""
    torch.manual_seed(1)
    model = timm.create_model(released.NAME.partition('.')[0]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope='session')
def image():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope='session')
def authors_file(weights, tmp_path_factory):
    """The weights as the authors' training would have saved them."""
    import argparse
    path = tmp_path_factory.mktemp('authors') / 'checkpoint.pth.tar'
    torch.save(dict(
        epoch=299, arch='small_released', state_dict=to_authors(weights.state_dict()), version=2, metric=1.,
        optimizer=dict(state={0: dict(step=3, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=1e-3, params=[0])]),
        args=argparse.Namespace(model='small_released', lr=1e-3), amp_scaler=dict(scale=65536.)), path)
    return path.read_bytes()


@pytest.fixture(scope='session')
def hub_files(weights, tmp_path_factory):
    """The weights as files of a hub repository."""
    folder = tmp_path_factory.mktemp('hub_files')
    timm.models.save_for_hf(weights, folder, safe_serialization=True)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def on_hub(hub, hub_files):
    hub.commit(f'org/{released.NAME}', hub_files)
    return hub


@pytest.fixture
def on_drive(drive_server, authors_file):
    drive_server.files[released.FILE_ID] = ('elsa.pth.tar', authors_file)
    return drive_server
