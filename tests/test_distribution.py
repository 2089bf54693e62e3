"""The wheel, built from the sdist, where nothing but the core dependencies is installed."""
import configparser
import importlib.metadata as metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'elsa_models'
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / 'setup.cfg')
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
    core = _closure(CONFIG['options']['install_requires'].split('\n'))
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


def _requirements(lines, system='linux', machine='x86_64', python='3.11'):
    environment = dict(sys_platform=system, platform_machine=machine, python_version=python)
    found = [Requirement(line) for line in lines.strip().splitlines()]
    return [r for r in found if r.marker is None or r.marker.evaluate(environment)]


def test_floors_are_the_lowest_set():
    lines = (ROOT / 'constraints' / 'lowest.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if '==' in line)
    options = [CONFIG['options']['install_requires'], *CONFIG['options.extras_require'].values()]
    asked = itertools.chain.from_iterable(map(_requirements, options))
    floors = {r.name: s.version for r in asked for s in r.specifier if s.operator == '>='}
    del floors['ruff'], floors['mypy']  # they look at the code, which runs without them
    assert {'torch', 'timm', 'numba', 'onnx', 'pytest'} <= floors.keys() <= pins.keys()
    assert [name for name, floor in floors.items() if not f'{pins[name]}.'.startswith(f'{floor}.')] == []


@pytest.mark.parametrize('system, machine, python, wanted', [
    ('linux', 'x86_64', '3.11', '>=0.61'),
    ('linux', 'aarch64', '3.14', '>=0.61'),
    ('darwin', 'arm64', '3.13', '>=0.61'),
    ('win32', 'AMD64', '3.12', '>=0.61'),
    ('darwin', 'x86_64', '3.13', '<0.63,>=0.61'),
    ('darwin', 'x86_64', '3.14', None),
    ('win32', 'ARM64', '3.11', None),
    ('win32', 'ARM64', '3.12', '>=0.68'),
])
def test_numba_is_asked_for_where_it_has_wheels(system, machine, python, wanted):
    found = _requirements(CONFIG['options.extras_require']['cpu'], system, machine, python)
    assert [str(r.specifier) for r in found] == ([] if wanted is None else [wanted])


def test_an_index_can_show_the_readme():
    """Its pictures and links lead to the repository that a release was built from."""
    code = 'import setuptools; setuptools.setup = lambda **kw: print(kw["long_description"])\nimport setup'
    page = 'https://example.org/owner/name'
    env = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}
    texts = [_run(sys.executable, '-c', code, cwd=ROOT, env={**env, 'PROJECT_URL': url}) for url in ('', page + '/')]
    links = [re.findall(r'(!?)\[[^]]*\]\(([^)]+)\)', text) for text in texts]
    own = [(mark, link) for mark, link in links[0] if not link.startswith(('https://', '#'))]
    assert texts[0] == (ROOT / 'README.md').read_text() + '\n' and len(own) >= 5
    folder = {'!': f'{page}/raw/v{metadata_version()}', '': f'{page}/blob/v{metadata_version()}'}
    assert [x for x in links[1] if x[1].startswith(page)] == [(mark, f'{folder[mark]}/{link}') for mark, link in own]
    assert [x for x in links[1] if not x[1].startswith(page)] == [x for x in links[0] if x not in own]


def test_what_is_packed(built):
    sdist, wheel = built
    sources = {'elsa_command.py', 'elsa_models/py.typed', *(str(p.relative_to(ROOT)) for p in PACKAGE.rglob('*.py'))}
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
sys.modules['triton'] = None  # torch brings it on Linux
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
