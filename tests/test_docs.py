"""Every block of Python in README.md and docs/ runs as it is printed, in a process of its own."""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forked import Forked
from helpers import keyed_state_dict
from PIL import Image

import elsa_models

ROOT = Path(__file__).parents[1]
FILES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
SLOW = ('torch.export.export', 'torch.onnx.export', 'export_onnx')  # half a minute and more


def _missing(code):
    """Libraries that the code imports and that are not installed."""
    found = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in found if isinstance(n, ast.ImportFrom)}
    return sorted(n for n in {name.partition('.')[0] for name in names} if importlib.util.find_spec(n) is None)


def _marks(path, code):
    if any(word in code for word in SLOW):
        yield pytest.mark.slow
    if path.name == 'use-with.md':
        missing = _missing(code) or (_missing('import accelerate') if 'Trainer(' in code else [])
        yield pytest.mark.slow  # imports alone take seconds
        yield pytest.mark.skipif(bool(missing), reason=f'not installed: {", ".join(missing)}')


def _blocks():
    for path in FILES:
        text = path.read_text(encoding='utf-8')
        for match in re.finditer(r'^```python\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
            line = text[:match.start()].count('\n') + 2
            yield pytest.param(match[1], marks=[*_marks(path, match[1])], id=f'{path.relative_to(ROOT)}:{line}')


BLOCKS = list(_blocks())


# what the blocks expect to find: files, and weights behind names


def _write_checkpoint(path):
    torch.save(dict(state_dict=keyed_state_dict('tiny'), epoch=3), path)


def _write_detector(path):
    state_dict = {
        f'backbone.{k}': x for k, x in keyed_state_dict('tiny').items() if not k.startswith(('norm.', 'head.'))}
    for i in range(4):
        state_dict.update({f'backbone.norm{i}.{part}': torch.ones(96 << i) for part in ('weight', 'bias')})
    torch.save(dict(state_dict=state_dict), path)


def _write_onnx(path):
    elsa_models.export_onnx(
        timm.create_model('test_elsa_swin', img_size=224), path, label_names=[f'kind {i}' for i in range(1000)])


def _write_photo(path):
    noise = np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((451, 333), Image.Resampling.BICUBIC).save(path)


def _write_pictures(path):
    for kind in ('train/cats', 'train/dogs', 'val/cats', 'val/dogs'):
        (path / kind).mkdir(parents=True)
        for i in range(4):
            _write_photo(path / kind / f'{i}.png')


def _train_segmenter(path):
    arguments = [
        '--config', ROOT / 'configs' / 'segmentation' / 'shapes.yaml', '--output', path, '--name',
        'shapes_segmentation', '--epochs', 1, '--train-images', 4, '--val-images', 2, '--batch-size', 2]
    subprocess.run([sys.executable, ROOT / 'scripts' / 'train_segmentation.py', *map(str, arguments)], check=True)


WRITERS = {  # by what a block reads
    "file='elsa_swin_tiny.pth.tar'": ('elsa_swin_tiny.pth.tar', _write_checkpoint),
    "'mask_rcnn_elsa_tiny.pth'": ('mask_rcnn_elsa_tiny.pth', _write_detector),
    "InferenceSession('model.onnx'": ('model.onnx', _write_onnx),
    "compile_model('model.onnx'": ('model.onnx', _write_onnx),
    "Image.open('photo.jpg')": ('photo.jpg', _write_photo),
    "'pictures'": ('pictures', _write_pictures),
    "'output/shapes_segmentation/model'": ('output', _train_segmenter),
}


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """Gives the path of a file of `WRITERS`, written when it is first asked for."""
    folder = tmp_path_factory.mktemp('files')

    def path_of(name, write):
        if not (folder / name).exists():
            write(folder / name)
        return folder / name

    return path_of


def _run(code, authors_tiny):
    """Run code where weights behind names are at hand: those of the authors right, those of timm random."""
    import gdown
    from timm.models import _builder

    from elsa_models.hub import sources
    load_pretrained = _builder.load_pretrained

    def load_if_ours(model, *args, **kwargs):
        if type(model).__module__.partition('.')[0] == elsa_models.__name__:
            load_pretrained(model, *args, **kwargs)

    _builder.load_pretrained = load_if_ours
    sources._look_up = lambda host: None
    gdown.download = lambda id, output, **kwargs: shutil.copyfile(authors_tiny, output)
    exec(compile(code, '<block>', 'exec'), {'__name__': '__main__'})


def test_blocks_are_found():
    assert len(BLOCKS) >= 16


@pytest.mark.parametrize('code', BLOCKS)
def test_block(code, tmp_path, files):
    for word, (name, write) in WRITERS.items():
        if word in code:
            (tmp_path / name).symlink_to(files(name, write))
    env = {**os.environ, 'ELSA_CACHE': str(tmp_path / 'cache'), 'ELSA_HUB_NAMESPACE': ''}
    authors_tiny = files('elsa_swin_tiny.pth.tar', _write_checkpoint)
    Forked(_run, (code, str(authors_tiny)), env, cwd=tmp_path, paths=[Path(__file__).parent]).result(timeout=300)


@pytest.mark.slow
def test_notebook(tmp_path):
    """Its cells, from top to bottom, in one process; as they are printed, they have run."""
    cells = json.loads((ROOT / 'docs' / 'quickstart.ipynb').read_text(encoding='utf-8'))['cells']
    cells = [cell for cell in cells if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell['outputs'] if o['output_type'] == 'error']
    (tmp_path / 'cells.py').write_text('\n'.join(''.join(cell['source']) for cell in cells), encoding='utf-8')
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, 'cells.py'], cwd=tmp_path, env=env, check=True, timeout=900)


def test_the_classification_in_deploy_prepares_as_timm_does(tmp_path, files, monkeypatch, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    for name, write in (('model.onnx', _write_onnx), ('photo.jpg', _write_photo)):
        (tmp_path / name).symlink_to(files(name, write))
    code, = [p.values[0] for p in BLOCKS if "Image.open('photo.jpg')" in p.values[0]]
    found = {}
    exec(compile(code, '<block>', 'exec'), found)
    config = {**found['config'], 'input_size': (3, found['height'], found['width'])}
    with Image.open('photo.jpg') as image:
        x = timm.data.create_transform(**config, is_training=False)(image)
    assert np.abs(found['x'][0] - x.numpy()).max() < 1e-5
    logits, = onnxruntime.InferenceSession('model.onnx').run(None, {'image': x[None].numpy()})
    assert capsys.readouterr().out == f'kind {logits[0].argmax()}\n'
