"""timm's own tests/test_models.py, as released, on the models of this package."""
import io
import re
import tarfile

import pytest
import timm
import torch
from timm.models import model_entrypoint
from timm_peer import SdistError, run_suite, timm_sdist

import elsa_models  # noqa: F401  registers the models

# what timm runs for every registered model, with the largest fixed input size that it takes the time for
COMMON_TESTS = {
    'test_model_forward': 384,
    'test_model_backward': 320,
    'test_model_forward_torchscript': 320,
    'test_model_forward_intermediates_features': 256,
    'test_model_forward_intermediates': 256,
    'test_prune_intermediate_layers_contract': 256,
    'test_model_forward_fx': 256,
    'test_model_backward_fx': 224,
    'test_model_forward_fx_torchscript': 320,
}
# spatial features that the standard head pools
MAP_TESTS = {'test_model_forward_features': 256, 'test_model_default_cfgs': float('inf')}
# token features, which timm calls non-standard
TOKEN_TESTS = {'test_model_default_cfgs_non_std': 320}
# these two look at every pretrained tag of a model, all others at the bare name
TAGGED_TESTS = ('test_model_default_cfgs', 'test_model_default_cfgs_non_std')
SIZE_SKIP = 'Fixed input size model > limit.'


def _own_models(module=''):
    return [n for n in timm.list_models(module=module) if model_entrypoint(n).__module__.startswith('elsa_models.')]


SMALL_MODELS = [n for n in _own_models() if n.startswith('test_')]
MODULES = sorted({model_entrypoint(n).__module__.rpartition('.')[2] for n in SMALL_MODELS})


def _expected_tests(names):
    """(function, model name) of the tests that must pass, and of those that timm skips for their input size."""
    passed, skipped = set(), set()
    for name in names:
        model = timm.create_model(name, device='meta')
        cfg = model.pretrained_cfg
        # the resolution that the name promises, so that no entry of a cfg can widen what is skipped
        size = re.search(r'_(\d{3})$', name)
        size = (int(size.group(1)) if size else 224) if cfg.get('fixed_input_size') else 0
        features = model.forward_features(torch.empty(1, *cfg['input_size'], device='meta'))
        tests = TOKEN_TESTS if features.dim() == 3 else MAP_TESTS
        for test, limit in {**COMMON_TESTS, **tests}.items():
            tagged = timm.list_models(name, include_tags=True) if test in TAGGED_TESTS else [name]
            (passed if size <= limit else skipped).update((test, n) for n in tagged)
    return passed, skipped


def _check_suite(folder, names):
    expected, expected_skips = _expected_tests(names)
    result = run_suite(folder, names, timeout=7200.)
    assert result.returncode == 0, result.output
    assert not result.failed
    # every test by its name: one that is gone, new, or skipped without our knowing of it is a failure as well
    assert result.passed == expected
    assert result.skipped == {key: SIZE_SKIP for key in expected_skips}
    return result


def test_small_models(tmp_path):
    result = _check_suite(tmp_path, SMALL_MODELS)
    for name in SMALL_MODELS:
        assert sum(n.partition('.')[0] == name for _, n in result.passed) >= 10, name
    assert not result.skipped


@pytest.mark.slow
@pytest.mark.parametrize('module', MODULES)
def test_large_models(tmp_path, module):
    _check_suite(tmp_path, [n for n in _own_models(module) if n not in SMALL_MODELS])


FAULTS = {
    'pool_default': {'test_model_default_cfgs'},
    'idle_parameter': {
        'test_model_backward', 'test_model_backward_fx', 'test_prune_intermediate_layers_contract'},
    'final_features': {'test_model_forward_intermediates'},
}


@pytest.mark.parametrize('faults', [
    tuple(FAULTS), *(pytest.param((fault,), marks=pytest.mark.slow) for fault in FAULTS)], ids='+'.join)
def test_planted_faults_are_found(tmp_path, faults):
    # the other tests still pass, so it is the faults and not the planting that were found
    result = run_suite(tmp_path, ['test_elsa_swin'], faults=faults)
    assert result.returncode == 1, result.output
    assert {test for test, _ in result.failed} == set().union(*(FAULTS[f] for f in faults)), result.output
    expected, _ = _expected_tests(['test_elsa_swin'])
    assert result.passed | result.failed == expected


def test_unknown_model_is_no_success(tmp_path):
    # pytest itself calls an empty selection a failure, and so must the runner
    result = run_suite(tmp_path, ['elsa_nothing'])
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert not result.passed


def _write_sdist(path, version):
    with tarfile.open(path, 'w:gz') as archive:
        metadata = f'Metadata-Version: 2.1\nName: timm\nVersion: {version}\n'.encode()
        info = tarfile.TarInfo(f'timm-{version}/PKG-INFO')
        info.size = len(metadata)
        archive.addfile(info, io.BytesIO(metadata))


def test_sdist_of_another_version_is_refused(tmp_path, monkeypatch):
    sdist = tmp_path / 'timm.tar.gz'
    monkeypatch.setenv('ELSA_TIMM_SDIST', str(sdist))
    with pytest.raises(SdistError, match='not a readable sdist'):
        timm_sdist()
    sdist.write_bytes(b'half a file')
    with pytest.raises(SdistError, match='not a readable sdist'):
        timm_sdist()
    _write_sdist(sdist, '0.0.1')
    with pytest.raises(SdistError, match=f'holds timm 0.0.1, but timm {timm.__version__} is installed'):
        timm_sdist()


def test_missing_sdist_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv('ELSA_TIMM_SDIST', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setattr(timm, '__version__', '0.0.1')
    with pytest.raises(SdistError, match='set ELSA_TIMM_SDIST to its path'):
        timm_sdist()
    assert not list(tmp_path.rglob('*.tar.gz'))


def test_cached_sdist_is_checked(tmp_path, monkeypatch):
    monkeypatch.delenv('ELSA_TIMM_SDIST', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setattr(timm, '__version__', '0.0.1')
    cached = tmp_path / 'elsa_models' / 'timm_sdist' / 'timm-0.0.1.tar.gz'
    cached.parent.mkdir(parents=True)
    _write_sdist(cached, '0.0.1')
    assert timm_sdist() == cached
    # a broken one is dropped and fetched again, here in vain
    cached.write_bytes(b'half a file')
    with pytest.raises(SdistError, match='Cannot get the sdist'):
        timm_sdist()
    assert not cached.exists()
