import os
import subprocess
import sys
from pathlib import Path

import pytest

from elsa_models import _files as files
from elsa_models._files import OutputError, replace_folder, write_atomically

NAMES = ('a', 'b')


def _content(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_creates_and_replaces(tmp_path):
    folder = tmp_path / 'deep' / 'result'
    for text in ('first', 'second'):
        with replace_folder(folder, NAMES) as temporary:
            assert temporary.parent == folder.parent
            (temporary / 'a').write_text(text)
            assert not folder.exists() or _content(folder) == {'a': 'first'}
        assert _content(folder) == {'a': text}
    assert [p.name for p in folder.parent.iterdir()] == ['result']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_former_folder_alone(tmp_path, error):
    folder = tmp_path / 'result'
    with replace_folder(folder, NAMES) as temporary:
        (temporary / 'a').write_text('first')
    with pytest.raises(error), replace_folder(folder, NAMES) as temporary:
        (temporary / 'a').write_text('half')
        raise error
    assert _content(folder) == {'a': 'first'}
    assert [p.name for p in tmp_path.iterdir()] == ['result']


def test_failure_to_rename_brings_the_former_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / 'result'
    with replace_folder(folder, NAMES) as temporary:
        (temporary / 'a').write_text('first')
    rename = type(folder).rename

    def failing(self, target):
        if target == folder and 'former' not in self.name:
            raise OSError('no')
        return rename(self, target)

    monkeypatch.setattr(type(folder), 'rename', failing)
    with pytest.raises(OSError, match='no'), replace_folder(folder, NAMES) as temporary:
        (temporary / 'a').write_text('second')
    assert _content(folder) == {'a': 'first'}


@pytest.mark.parametrize('at', range(3))
def test_what_a_kill_leaves_behind_is_put_right_by_the_next(tmp_path, at):
    """Killed while the folder is filled, and before and after the second of the two renames."""
    folder = tmp_path / 'result'
    with replace_folder(folder, NAMES) as temporary:
        (temporary / 'a').write_text('first')
    child = os.fork()
    if child == 0:
        rename, calls = Path.rename, []

        def killed(self, target):
            calls.append(target)
            if len(calls) == at + 1:
                os._exit(9)
            return rename(self, target)

        Path.rename = killed
        files.shutil.rmtree = lambda *args, **kwargs: os._exit(9)
        with replace_folder(folder, NAMES) as temporary:
            (temporary / 'a').write_text('second')
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 2
    files.recover(folder)
    assert [p.name for p in tmp_path.iterdir()] == ['result']
    assert _content(folder) == {'a': 'second' if at == 2 else 'first'}


def test_what_another_process_works_on_is_left_alone(tmp_path):
    folder = tmp_path / 'result'
    stranger = tmp_path / '.result-deadbeef'
    stranger.mkdir()
    with replace_folder(folder, NAMES) as temporary:
        with replace_folder(folder, NAMES) as other:
            assert temporary.is_dir() and other.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.result-deadbeef', 'result']


@pytest.mark.parametrize('name', ['file/result', 'x' * 300])
def test_folder_that_cannot_be_made_is_one_error(tmp_path, name):
    (tmp_path / 'file').touch()
    with pytest.raises(OutputError, match='result: cannot be written|xxx: cannot be written'):
        with replace_folder(tmp_path / name, ['a']):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_foreign_content_is_never_replaced(tmp_path):
    folder = tmp_path / 'result'
    folder.mkdir()
    (folder / 'thesis.txt').write_text('x')
    with pytest.raises(OutputError, match=r"'thesis\.txt'"), replace_folder(folder, NAMES):
        pytest.fail('must not be entered')
    (folder / 'thesis.txt').unlink()
    with pytest.raises(OutputError, match=r"'late\.txt'"), replace_folder(folder, NAMES):
        (folder / 'late.txt').write_text('x')
    assert _content(folder) == {'late.txt': 'x'}
    (tmp_path / 'file').write_text('x')
    with pytest.raises(OutputError, match='file: is a file'), replace_folder(tmp_path / 'file', NAMES):
        pytest.fail('must not be entered')


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'x'
    write_atomically('é\n', path)
    assert path.read_bytes() == 'é\n'.encode()
    write_atomically(b'\xff', str(path))

    def failing(*args):
        raise OSError('full')

    for name in ('elsa_models._files.os.replace', 'elsa_models._files.os.fsync'):
        with monkeypatch.context() as patch:
            patch.setattr(name, failing)
            with pytest.raises(OSError, match='full'):
                write_atomically('other', path)
    assert path.read_bytes() == b'\xff' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_imports_point_one_way():
    # hub and training are siblings
    code = 'import sys, elsa_models, elsa_models.hub.publish; sys.exit("elsa_models.training" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
