"""Files and folders that appear complete or not at all."""
import glob
import os
import re
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Collection, Iterator, Optional, Union

try:
    import fcntl
except ImportError:  # of Windows, where what a kill leaves behind stays
    fcntl = None

_OURS = re.compile(r'\.(.+)-[0-9a-f]{8}\.(tmp|former)')
# in a folder of ours alone: of former versions and of other libraries, too
_LIKE_OURS = re.compile(r'\.(.+?)(-[0-9a-z_]{8}(\.tmp|\.former|-former)?|\.tmp)')


class OutputError(ValueError):
    """A result that cannot be written, or a folder that must not be replaced."""


def _beside(path: Path, kind: str = 'tmp') -> Path:
    return path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}.{kind}')


@contextmanager
def whole_file(path: Union[str, Path]) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, open for bytes, which takes its place once it is on the disk.

    Raises:
        OSError: It cannot be written; a former file is as it was.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == 'posix':  # the new name, too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(data: Union[str, bytes], path: Union[str, Path]) -> None:
    """Write a file that appears complete or not at all, see `whole_file`.

    Args:
        data: Text, which is written as UTF-8 (what is none, as in names of files, escaped), or bytes.
        path: File to create or replace; its folder must exist.

    Raises:
        OSError: It cannot be written; a former file is as it was.
    """
    with whole_file(path) as file:
        file.write(data.encode('utf-8', 'backslashreplace') if isinstance(data, str) else data)


def is_temporary(name: str, names: Collection[str]) -> bool:
    """Whether a name is that of a temporary file or folder of one of `names`, in a folder of ours."""
    match = _LIKE_OURS.fullmatch(name)
    return match is not None and (match[1] in names or match[1] in {Path(x).stem for x in names})


def remove_temporaries(folder: Union[str, Path], names: Collection[str]) -> None:
    """Remove what writers of `names` have left in a folder when they were killed. No other may be at work there."""
    for path in Path(folder).iterdir():
        if is_temporary(path.name, names):
            remove(path)


def remove(path: Union[str, Path]) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_replaceable(folder: Union[str, Path], names: Collection[str]) -> None:
    """Require that a folder does not exist or holds nothing beyond `names` and their temporaries.

    Args:
        folder: Folder that is to be replaced.
        names: Names of the files and folders that may be lost with it.

    Raises:
        OutputError: There is something else in it, or it is a file.
    """
    folder = Path(folder)
    if folder.is_dir():
        strange = sorted(p.name for p in folder.iterdir() if p.name not in names and not is_temporary(p.name, names))
        if strange:
            raise OutputError(
                f'{folder}: holds {strange[0]!r}, which does not belong there, and would be replaced as a whole.'
                f' Choose another folder, or move {strange[0]!r} away.')
    elif folder.exists() or folder.is_symlink():
        raise OutputError(f'{folder}: is a file, must be a folder.')


@contextmanager
def replace_folder(folder: Union[str, Path], names: Collection[str]) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`, which takes its place when all has gone well.

    Until then a former `folder` is not touched. On an exception the temporary folder is removed; what a process that
    was killed has left behind is put right by the next.

    Args:
        folder: Folder to create or replace; its parents are created.
        names: Names of the files and folders that may be replaced, see `check_replaceable`.

    Yields:
        The temporary folder, empty.

    Raises:
        OutputError: `folder` holds something that is not in `names`, or cannot be made.
    """
    folder = Path(folder).absolute()
    temporary = _beside(folder)
    try:
        recover(folder)
        check_replaceable(folder, names)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as e:
        raise OutputError(f'{folder}: cannot be written ({e}).') from e
    lock = _lock(temporary)
    try:
        yield temporary
        check_replaceable(folder, names)
        move_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def temporary_folder(path: Union[str, Path]) -> Iterator[Path]:
    """An empty folder beside `path`, gone afterwards; with it goes what killed processes have left of such.

    Yields:
        The folder, on the same disk as `path`.
    """
    path = Path(path).absolute()
    recover(path)
    folder = _beside(path)
    folder.mkdir()
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> Optional[int]:
    """Mark a folder as in use, until the descriptor is closed or the process ends; None where it is or that fails."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def recover(folder: Union[str, Path]) -> None:
    """Put right what a killed process has left of `folder`: bring a former one back, remove what nobody works on."""
    folder = Path(folder).absolute()
    left = [Path(p) for p in glob.glob(f'{glob.escape(str(folder.parent))}/.{glob.escape(folder.name)}-*')]
    for path in left:
        match = _OURS.fullmatch(path.name)
        if match is None or match[1] != folder.name or not path.is_dir():
            continue
        if match[2] == 'former' and not folder.exists():
            path.rename(folder)
            continue
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def move_into_place(temporary: Union[str, Path], folder: Union[str, Path]) -> None:
    """Rename a folder to another beside it, and remove the one that it replaces.

    Args:
        temporary: Folder that is complete.
        folder: Name that it takes. A folder of this name is lost.
    """
    temporary, folder = Path(temporary), Path(folder)
    if not folder.exists():
        temporary.rename(folder)
        return
    former = _beside(folder, 'former')
    folder.rename(former)
    try:
        temporary.rename(folder)
    except OSError:
        former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)
