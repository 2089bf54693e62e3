"""The wheel, built from the sdist, where nothing but the core dependencies is installed."""
import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'elsa_models'
FILES = ('setup.cfg', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE')


def _run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The sdist and the wheel."""
    pytest.importorskip('build')
    folder = tmp_path_factory.mktemp('built')
    source = folder / 'source'  # a copy, so that nothing that an earlier build has left is taken
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'configs', source / 'configs')
    for name in (*FILES, 'elsa_command.py'):
        shutil.copy(ROOT / name, source)
    _run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, source)
    sdist, = folder.glob('*.tar.gz')
    wheel, = folder.glob('*.whl')
    return sdist, wheel


def _closure(requirements):
    """Names of the distributions that requirements lead to, without extras."""
    out = set()
    queue = [re.split(r'[^\w.-]', r.strip())[0] for r in requirements if r.strip()]
    while queue:
        name = re.sub(r'[-_.]+', '-', queue.pop()).lower()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system or Python
        if name not in out:
            out.add(name)
            queue += [re.split(r'[^\w.-]', r)[0] for r in requires if 'extra ==' not in r]
    return out


@pytest.fixture(scope='module')
def core_python(built, tmp_path_factory):
    """An interpreter that sees the wheel and the core dependencies, as they are here, and nothing else."""
    import configparser
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    core = _closure(config['options']['install_requires'].split('\n'))
    assert {'torch', 'torchvision', 'timm', 'numpy'} <= core and 'numba' not in core and 'onnx' not in core
    folder = tmp_path_factory.mktemp('core')
    _run(sys.executable, '-m', 'venv', '--without-pip', folder)
    python = folder / 'bin' / 'python'
    site = Path(_run(python, '-c', 'import site; print(site.getsitepackages()[0])').strip())
    for name in core:
        distribution = metadata.distribution(name)
        for top in {f.parts[0] for f in distribution.files or () if f.parts[0] not in ('..', '__pycache__')}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(site)
    return python


def test_what_is_packed(built):
    sdist, wheel = built
    sources = {'elsa_command.py', *(str(p.relative_to(ROOT)) for p in PACKAGE.rglob('*.py'))}
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / 'configs').rglob('*.yaml')}
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if '.dist-info/' not in n}
        licence = [n for n in archive.namelist() if n.endswith('/LICENSE')]
    assert names == sources | {f'elsa_models/{name}' for name in recipes} and licence
    with tarfile.open(sdist) as archive:
        packed = {n.partition('/')[2] for n in archive.getnames()}
    assert sources | recipes | set(FILES) <= packed


PROGRAM = '''
import sys
sys.path = [p for p in sys.path if p]
import timm, torch
import elsa_models
from elsa_models import hub, layers, models, ops
assert 'site-packages' in elsa_models.__file__, elsa_models.__file__
for name in ('numba', 'onnx', 'onnxruntime', 'sklearn', 'matplotlib', 'gdown', 'datasets', 'scipy'):
    assert name not in sys.modules, name
names = [n for n in timm.list_models('test_*') if timm.models.model_entrypoint(n).__module__.startswith('elsa_models')]
assert len(names) >= 2
for name in names:
    model = timm.create_model(name, num_classes=3)
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    model(x).sum().backward()
    maps = timm.create_model(name, features_only=True).eval()(x)
    assert len(maps) >= 3
    try:
        elsa_models.export_onnx(model.eval(), 'model.onnx')
    except ImportError as e:
        assert '[onnx]' in str(e), e
    else:
        raise AssertionError('exported without onnx')
assert elsa_models.count_macs(model) > 0 if hasattr(elsa_models, 'count_macs') else True
timm.models.save_for_hf(model, 'folder')
again = timm.create_model('local-dir:folder', pretrained=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
try:
    timm.create_model('elsa_swin_tiny', pretrained=True)
except hub.WeightsError as e:
    assert "pip install '.[hub]'" in str(e), e
print(elsa_models.__version__)
'''


def test_core_dependencies_suffice(core_python, tmp_path):
    env = {'HF_HOME': str(tmp_path / 'home'), 'PATH': '/usr/bin:/bin'}
    out = _run(core_python, '-c', PROGRAM, cwd=tmp_path, env=env).split()
    assert out == [metadata_version()]
    assert 'usage: elsa COMMAND' in _run(core_python, '-m', 'elsa_models', cwd=tmp_path, env=env)


def metadata_version():
    return re.search(r"'(.+)'", (PACKAGE / '_version.py').read_text())[1]


@pytest.mark.parametrize('room, extra', [
    ('training', 'train'), ('dense.segmentation', 'segmentation'), ('dense.detection', None)])
def test_what_needs_an_extra_says_so(core_python, tmp_path, room, extra):
    """It imports, or names the extra; one process for each, since a failed import leaves modules behind."""
    code = f'import elsa_models.{room}'
    done = subprocess.run([core_python, '-c', code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 or extra is not None and f'[{extra}]' in done.stderr, done.stderr[-2000:]
