"""`pretrained=True` from a file on the web, at the address that a family declares for it."""
import dataclasses
import re

import pytest
import timm
import torch
from hub_helpers import assert_right, cache_files, load
from huggingface_hub import constants
from servers import Fault, WebServer
from timm.models import _registry

from elsa_models.hub import WeightsError, sources
from elsa_models.models.axial_resnet import checkpoint_filter_fn

NAME = 'axial_resnet26s.jhu_in1k'
PATH = '/~hwang157/axial26s.pth'


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(1)
    return timm.create_model('axial_resnet26s').eval()


@pytest.fixture(scope='module')
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('authors') / 'axial26s.pth'
    torch.save(dict(net={f'module.{k}': x for k, x in weights.state_dict().items()}, epoch=130, optim={}), path)
    return path.read_bytes()


@pytest.fixture
def web(file, monkeypatch):
    """The authors' server, which is where the registry says."""
    server = WebServer()
    for name in (NAME, NAME.partition('.')[0]):
        cfg = dataclasses.replace(_registry._model_pretrained_cfgs[name], url=server.url + PATH)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)
    monkeypatch.setattr(sources, '_TIMEOUT', 1.)
    server.files[PATH] = file
    yield server
    server.close()


def test_the_listing_tells_the_truth():
    assert timm.list_pretrained('axial*') == [NAME]
    cfg = timm.get_pretrained_cfg('axial_resnet26s')
    assert cfg.url == f'https://www.cs.jhu.edu{PATH}' and cfg.license == 'apache-2.0'


@pytest.mark.parametrize('name', [NAME, 'axial_resnet26s'])
def test_from_the_web_and_then_from_the_cache(web, weights, own_world, name):
    assert_right(load(name), weights)
    assert len(web.requests) == 1
    files = cache_files(own_world)
    assert len(files) == 2 and not any('partial' in f for f in files)
    assert_right(load(name), weights)
    assert len(web.requests) == 1
    small = load(name, num_classes=7, img_size=160)
    assert small.head.fc.out_features == 7 and small.stages[3][0].self_attn.height.rel_key.shape[1] == 19


@pytest.mark.parametrize('kind', ['truncate', 'drop', 'hang'])
def test_downloads_that_break_are_continued(web, weights, own_world, kind, monkeypatch):
    web.fault = Fault(kind, times=1, after=70000, delay=5.)
    assert_right(load(NAME), weights)
    assert web.downloads[0] is None and re.fullmatch('bytes=[1-9][0-9]*-', web.downloads[1])


def test_downloads_are_continued_later(web, weights, own_world, monkeypatch):
    web.fault = Fault('truncate', after=70000)
    monkeypatch.setattr(sources, '_RETRIES', 0)
    with pytest.raises(WeightsError, match='ended after 70000 of'):
        load(NAME)
    files = cache_files(own_world)
    assert len(files) == 1 and files[0].endswith('.part')
    web.fault = None
    assert_right(load(NAME), weights)
    assert web.downloads[-1] == 'bytes=70000-'


def test_a_server_that_cannot_continue_starts_again(web, weights, own_world, monkeypatch):
    partial = own_world / 'elsa_models' / NAME / 'partial'
    partial.mkdir(parents=True)
    (partial / 'checkpoint.part').write_bytes(b'x' * 1000)
    web.fault = Fault('no_ranges')
    assert_right(load(NAME), weights)
    assert web.downloads == ['bytes=1000-']


def test_an_older_file_is_not_continued(web, weights, own_world, file):
    partial = own_world / 'elsa_models' / NAME / 'partial'
    partial.mkdir(parents=True)
    (partial / 'checkpoint.part').write_bytes(b'x' * 1000)  # whose end belongs to another file
    assert_right(load(NAME), weights)
    assert web.downloads == ['bytes=1000-', None]


@pytest.mark.parametrize('status', [403, 404, 500])
def test_pages_of_errors(web, weights, own_world, status):
    web.fault = Fault('status', status=status)
    with pytest.raises(WeightsError) as e:
        load(NAME)
    lines = str(e.value).splitlines()
    assert f"the authors' file {web.url}{PATH}: HTTPError: HTTP Error {status}" in lines[3]
    assert lines[-1].startswith(f'  download {web.url}{PATH} in a browser, and timm.create_model(\'axial_resnet26s\'')
    assert len(web.requests) == (4 if status == 500 else 1)
    assert not cache_files(own_world)
    web.fault = None
    assert_right(load(NAME), weights)


def test_wrong_files(web, weights, own_world, file):
    for data, words in ((b'<html>' * 20000, 'is a web page'), (file[:-100], 'cannot be read')):
        web.files[PATH] = data
        with pytest.raises(WeightsError, match=words):
            load(NAME)
        assert not cache_files(own_world)
    web.files[PATH] = file
    assert_right(load(NAME), weights)


def test_nothing_comes_without_a_server(own_world, monkeypatch, web):
    web.close()
    with pytest.raises(WeightsError, match='URLError|ConnectionRefusedError'):
        load(NAME)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match='unset HF_HUB_OFFLINE'):
        load(NAME)


def test_other_addresses_are_left_to_timm(web, weights, own_world, monkeypatch):
    asked = []

    def get(url, **kwargs):
        asked.append(url)
        return checkpoint_filter_fn(weights.state_dict(), weights)

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', get)
    load('axial_resnet26s', pretrained_cfg_overlay=dict(url='https://example.org/x.pth'))
    assert asked == ['https://example.org/x.pth'] and not web.requests


def test_only_the_web_is_the_web(tmp_path):
    (tmp_path / 'x').write_bytes(b'x')
    with pytest.raises(WeightsError, match='no address of http'):
        sources.download_from_web((tmp_path / 'x').as_uri(), tmp_path / 'out')
