import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart():
    spec = importlib.util.spec_from_file_location('quickstart', ROOT / 'scripts' / 'quickstart.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    for name in ('setup.cfg', 'pyproject.toml'):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def calls(quickstart, monkeypatch):
    """Record the commands instead of running them; an environment works from its creation on."""
    calls = []

    def check_call(arguments):
        calls.append(arguments)
        if 'venv' in arguments:
            python = quickstart.python_of(Path(arguments[-1]))
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text('')

    monkeypatch.setattr(quickstart.subprocess, 'check_call', check_call)
    monkeypatch.setattr(quickstart, 'works', lambda python: python.is_file())
    monkeypatch.setattr(quickstart, 'clashes', lambda python: False)
    monkeypatch.setattr(quickstart, 'is_small', lambda torch: False)
    return calls


def _kinds(calls):
    return ['venv' if 'venv' in c else 'install' for c in calls]


def test_complete_environment_is_used_again(quickstart, repository, calls):
    venv = repository / '.venv'
    assert quickstart.prepare(repository, venv) == quickstart.python_of(venv)
    assert _kinds(calls) == ['venv', 'install']
    assert calls[0][0] == sys.executable
    assert calls[1][0] == str(quickstart.python_of(venv)) and calls[1][-1] == f'{repository}[train,onnx]'
    quickstart.prepare(repository, venv)
    assert len(calls) == 2


def test_half_made_environment_is_repaired(quickstart, repository, calls, monkeypatch):
    venv = repository / '.venv'
    venv.mkdir()
    record = quickstart.subprocess.check_call

    def interrupted(arguments):
        record(arguments)
        if 'install' in arguments:
            raise subprocess.CalledProcessError(1, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(quickstart.subprocess, 'check_call', interrupted)
        with pytest.raises(subprocess.CalledProcessError):
            quickstart.prepare(repository, venv)
    quickstart.prepare(repository, venv)  # the interpreter is there, the packages are not
    assert _kinds(calls) == ['venv', 'install', 'install']
    quickstart.python_of(venv).unlink()
    quickstart.prepare(repository, venv)
    assert _kinds(calls)[3:] == ['venv', 'install']
    assert '--clear' in calls[3]


def test_failed_update_is_not_taken_for_complete(quickstart, repository, calls, monkeypatch):
    quickstart.prepare(repository, repository / '.venv')
    (repository / 'setup.cfg').write_text('other')

    def failing(arguments):
        raise subprocess.CalledProcessError(1, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(quickstart.subprocess, 'check_call', failing)
        with pytest.raises(subprocess.CalledProcessError):
            quickstart.prepare(repository, repository / '.venv')
    (repository / 'setup.cfg').write_text('setup.cfg')  # as at first, but the packages may be mixed by now
    quickstart.prepare(repository, repository / '.venv')
    assert _kinds(calls) == ['venv', 'install', 'install']


def test_changed_requirements_are_installed(quickstart, repository, calls):
    quickstart.prepare(repository, repository / '.venv')
    (repository / 'setup.cfg').write_text('other')
    quickstart.prepare(repository, repository / '.venv')
    assert _kinds(calls) == ['venv', 'install', 'install']


def test_interpreter_of_each_system(quickstart):
    assert quickstart.python_of(Path('v'), 'posix') == Path('v/bin/python')
    assert quickstart.python_of(Path('v'), 'nt') == Path('v/Scripts/python.exe')


def test_works_means_that_pip_runs(quickstart, tmp_path):
    assert quickstart.works(Path(sys.executable))
    assert not quickstart.works(tmp_path / 'absent')
    (tmp_path / 'broken').write_text('')
    assert not quickstart.works(tmp_path / 'broken')


def test_old_python_is_refused(quickstart):
    with pytest.raises(SystemExit, match=r'this is Python 3\.10, but 3\.11 or later is needed'):
        quickstart.check_python((3, 10, 1))
    quickstart.check_python()


def test_missing_ensurepip_is_explained(quickstart, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ensurepip', None)
    with pytest.raises(SystemExit, match='lacks the module ensurepip.*python3-venv'):
        quickstart.check_python()


@pytest.mark.parametrize('arguments, recipe', [
    ([], 'digits'),
    (['--epochs', '3'], 'digits'),
    (['--data', 'photos'], 'folder'),
    (['--epochs', '3', '--data=photos'], 'folder'),
    (['--config', 'mine.yaml', '--data', 'photos'], None),
])
def test_the_recipe_suits_the_data(arguments, recipe, monkeypatch):
    from elsa_models.commands import quickstart as command
    passed = []
    monkeypatch.setattr(command, 'train_command', lambda doc, job, argv, report: passed.extend([job, *argv]) or 0)
    assert command.main(arguments) == 0
    assert passed == ['classification', *([] if recipe is None else ['--config', recipe]), *arguments]


def test_options_of_its_own_are_not_passed_on(quickstart):
    own, known, arguments = quickstart.read(['--no-venv', '--epochs', '3', '--torch', 'cpu', '--data', 'photos'])
    assert own.no_venv and own.torch == 'cpu' and known.data == 'photos'
    assert arguments == ['--epochs', '3', '--data', 'photos']


def test_without_a_gpu_pytorch_is_the_small_build(quickstart, repository, calls, monkeypatch):
    requirements = 'torch>=2.9\n    torchvision>=0.24\n    timm'
    (repository / 'setup.cfg').write_text(f'[options]\ninstall_requires =\n    {requirements}')
    monkeypatch.setattr(quickstart, 'is_small', lambda torch: True)
    quickstart.install(Path('python'), repository, 'auto')
    small, package = calls
    assert small[-4:] == ['--index-url', quickstart.CPU_INDEX, 'torch>=2.9', 'torchvision>=0.24']
    assert package[-2:] == ['-e', f'{repository}[train,onnx]'] and '--index-url' not in package


@pytest.mark.parametrize('torch', ['auto', 'cpu'])
def test_the_large_build_serves_where_the_small_cannot_be_had(quickstart, repository, monkeypatch, torch, capsys):
    done = []

    def check_call(arguments):
        if '--index-url' in arguments:
            raise subprocess.CalledProcessError(1, arguments)
        done.append(arguments)

    (repository / 'setup.cfg').write_text('[options]\ninstall_requires = torch>=2.9')
    monkeypatch.setattr(quickstart.subprocess, 'check_call', check_call)
    monkeypatch.setattr(quickstart, 'is_small', lambda torch: True)
    if torch == 'cpu':  # was asked for
        with pytest.raises(subprocess.CalledProcessError):
            quickstart.install(Path('python'), repository, torch)
        assert not done
    else:
        quickstart.install(Path('python'), repository, torch)
        assert len(done) == 1 and 'cannot be had' in capsys.readouterr().out


def test_parts_of_pytorch_that_do_not_fit_give_way(quickstart, repository, calls, monkeypatch):
    (repository / 'setup.cfg').write_text('[options]\ninstall_requires = torch>=2.9')
    monkeypatch.setattr(quickstart, 'is_small', lambda torch: True)
    monkeypatch.setattr(quickstart, 'clashes', lambda python: True)
    quickstart.install(Path('python'), repository, 'auto')
    small, removal, package = calls
    assert '--index-url' in small and removal[-4:] == ['uninstall', '--yes', 'torch', 'torchvision']
    assert package[-2:] == ['-e', f'{repository}[train,onnx]'] and '--index-url' not in package


def test_which_build_of_pytorch(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart.shutil, 'which', lambda name: '/usr/bin/nvidia-smi')
    assert not quickstart.is_small('auto', 'linux') and quickstart.is_small('cpu', 'linux')
    monkeypatch.setattr(quickstart.shutil, 'which', lambda name: None)
    assert not quickstart.is_small('auto', 'darwin') and not quickstart.is_small('pypi', 'linux')
    assert quickstart.is_small('auto', 'linux') is not Path('/dev/nvidia0').exists()


@pytest.mark.parametrize('arguments, status, words', [
    (['--help'], 0, 'one sub-folder of images for each class'),
    (['--epochs', '3', '-h'], 0, 'python3 scripts/quickstart.py'),
    (['--data', 'nowhere'], 1, "error: --data: got 'nowhere', must be a folder"),
    (['--data', 'no/where'], 1, "error: --data: got 'no/where', must be a folder"),
    (['--config', 'nowhere.yaml'], 1, "error: --config: got 'nowhere.yaml', no such file"),
])
def test_nothing_is_installed_for_help_or_in_vain(quickstart, tmp_path, arguments, status, words):
    (tmp_path / 'scripts').mkdir()
    script = tmp_path / 'scripts' / 'quickstart.py'
    script.write_text((ROOT / 'scripts' / 'quickstart.py').read_text())
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['scripts']


def test_what_can_work_is_let_through(quickstart, tmp_path):
    (tmp_path / 'mine.yaml').write_text('')
    for arguments in ([], ['--data', 'digits'], ['--data', str(tmp_path)], ['--config', str(tmp_path / 'mine.yaml')],
                      ['--config', 'folder'],
                      ['--config', str(tmp_path / 'mine.yaml'), '--data', 'torch/cifar10']):
        quickstart.check_arguments(quickstart.read(arguments)[1], tmp_path / '.venv')


def test_help_is_the_trainings_where_that_is_installed(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, 'works', lambda python: True)
    quickstart.check_arguments(quickstart.read(['--help'])[1])


def test_needs_nothing_but_the_standard_library():
    # -I -S: no site packages, and nothing beside the script
    code = f"import runpy; runpy.run_path({str(ROOT / 'scripts' / 'quickstart.py')!r}, run_name='imported')"
    subprocess.run([sys.executable, '-I', '-S', '-c', code], check=True)
