"""A Numba that does not work, and a cache of machine code that is damaged, full, gone or from older sources."""
import ctypes
import errno
import importlib.util
import logging
import os
import shutil
from pathlib import Path

import programs
import pytest
import torch
from helpers import assert_near

from elsa_models.ops import _numba, local_attention, local_attention_reference

SOURCES = Path(_numba.__file__).parent

BROKEN = {
    'does_not_import': 'raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.3.")',
    'no_llvm': 'raise OSError("libllvmlite.so: cannot open shared object file")',
    'bare': '',  # imports, and has nothing
}


def _program(folder, **environment):
    code = '''
        import warnings
        warnings.simplefilter('ignore')
        import torch
        from elsa_models.ops import explain_backend, local_attention, local_attention_reference
        value, logits = torch.randn(1, 5, 6, 4, requires_grad=True), torch.randn(1, 5, 6, 2, 9)
        for _ in range(3):
            y = local_attention(value, logits, 3)
            y.sum().backward()
            assert (y - local_attention_reference(value, logits, 3)).abs().max() < 1e-5
        try:
            local_attention(value, logits, 3, backend='numba')
        except RuntimeError as error:
            print(error)
        print(explain_backend(value)['numba'])
    '''
    return programs.run(code, folder=folder, ELSA_BACKEND='', **environment)


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_numba_gives_way_to_pytorch(kind, tmp_path):
    (tmp_path / 'numba').mkdir()
    (tmp_path / 'numba' / '__init__.py').write_text(BROKEN[kind])
    _assert_gives_way(*_program(tmp_path), BROKEN[kind].partition('"')[2][:20] or 'config')


def test_jit_switched_off(tmp_path):
    pytest.importorskip('numba')
    _assert_gives_way(*_program(tmp_path, NUMBA_DISABLE_JIT='1'), 'NUMBA_DISABLE_JIT')


def _assert_gives_way(out, err, reason):
    assert err.count('Numba is installed but does not work') == 1  # one warning
    assert reason in err
    forced, explained = out.strip().splitlines()
    assert forced.startswith("backend 'numba' was forced but cannot serve: ") and reason in forced
    assert reason in explained


# the cache

numba = pytest.importorskip('numba')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, 'CACHE_DIR', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def _load(path=SOURCES / '_numba_probe.py'):
    """The smallest kernel, as a process that has just started would see it."""
    spec = importlib.util.spec_from_file_location('elsa_models.ops._numba_probe_again', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(module):
    """Compile or load the kernel; whether it came from the cache."""
    from numba import types

    from elsa_models.ops._simd import Vector
    numbers = (ctypes.c_float * 8)(*range(8))
    arguments = Vector(types.float32, 8), ctypes.addressof(numbers), 8
    _numba._compile(module, 'double', (arguments[0], int, int)).call(*arguments)
    assert list(numbers) == [2. * k for k in range(8)]
    return sum(module.double.stats.cache_hits.values()) == 1


def _files(cache):
    return [path for path in cache.rglob('*') if path.is_file()]


def test_code_is_kept(cache):
    assert not _call(_load())
    assert _call(_load())
    assert len(_files(cache)) == 1


@pytest.mark.parametrize('damage', [
    lambda content: b'', lambda content: content[:20], lambda content: content[:-7],
    lambda content: content[:200] + bytes(64) + content[264:], lambda content: b'<html>' * 100,
], ids=['empty', 'short', 'cut', 'zeroed', 'other'])
def test_damaged_code_is_compiled_anew(damage, cache):
    _call(_load())
    path, = _files(cache)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert not _call(_load())
    assert _call(_load())  # and mended


def test_code_that_cannot_be_read_as_such(cache):
    # right digest, nonsense inside, as of a version that keeps something else
    import hashlib
    _call(_load())
    path, = _files(cache)
    for payload in (b'nonsense', b'\x80\x04N.', b'cos\nnothing\n.'):
        path.write_bytes(hashlib.sha256(payload).digest() + payload)
        assert not _call(_load())


def test_a_vanished_folder(cache):
    module = _load()
    _call(_load())
    shutil.rmtree(cache)
    assert not _call(module)
    assert _call(_load())


@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written(error, cache, monkeypatch, caplog):
    from elsa_models.ops import _numba_cache

    def write(path, content):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(_numba_cache, '_write', write)
    monkeypatch.setattr(_numba_cache, '_warned', False)
    with caplog.at_level(logging.WARNING, 'elsa_models'):
        assert not _call(_load())
        assert not _call(_load())
    assert len(caplog.records) == 1 and os.strerror(error) in caplog.text


def test_a_file_in_place_of_the_folder(cache, caplog, monkeypatch):
    from elsa_models.ops import _numba_cache
    monkeypatch.setattr(_numba_cache, '_warned', False)
    cache.write_text('')
    assert not _call(_load())
    assert not _call(_load())
    assert len(caplog.records) == 1


def test_half_written_files_are_not_left(cache, monkeypatch):
    def replace(*args):
        raise OSError(errno.ENOSPC, 'full')

    monkeypatch.setattr(os, 'replace', replace)
    _call(_load())
    assert not _files(cache)


@pytest.mark.parametrize('changed', ['_numba_probe.py', '_simd.py'])
def test_code_of_older_sources_is_not_used(changed, cache, tmp_path, monkeypatch):
    # Numba itself looks at the file of the kernel alone
    copy = tmp_path / 'ops'
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.setattr(_numba, '__file__', str(copy / '_numba.py'))
    probe = copy / '_numba_probe.py'
    assert not _call(_load(probe))
    assert _call(_load(probe))
    with (copy / changed).open('a') as file:
        file.write('# an update\n')
    assert not _call(_load(probe))
    assert _call(_load(probe))
    assert len(_files(cache)) == 1  # and what is out of date is gone


def test_all_files_that_code_comes_from_are_looked_at():
    from elsa_models.ops.local_attention import numba_kernels
    names = {path.name for path in _numba._sources(numba_kernels)}
    assert {'numba_kernels.py', '_simd.py', '_numba.py'} <= names


def test_the_users_folder_serves_where_the_package_cannot_be_written(tmp_path, monkeypatch):
    from elsa_models.ops import _numba_cache
    monkeypatch.setattr(numba.config, 'CACHE_DIR', '')
    monkeypatch.delenv('LOCALAPPDATA', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
    package = tmp_path / 'package'
    package.mkdir()
    shutil.copy(SOURCES / '_numba_probe.py', package)
    (package / '__pycache__').write_text('')  # no folder can be made here
    assert not _call(_load(package / '_numba_probe.py'))
    assert _call(_load(package / '_numba_probe.py'))
    assert len(_files(tmp_path / 'user')) == 1
    assert _numba_cache._places


def test_numba_serves_here():
    value, logits = torch.randn(1, 5, 6, 4), torch.randn(1, 5, 6, 2, 9)
    y = local_attention(value, logits, 3, backend='numba')
    assert_near(y, local_attention_reference(value, logits, 3), 1e-6)
