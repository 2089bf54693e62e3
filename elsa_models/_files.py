"""Files and folders that appear complete or not at all."""
import logging
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Collection, Iterator, Union

_logger = logging.getLogger(__name__)


class OutputError(ValueError):
    """A result that cannot be written, or a folder that must not be replaced."""


def write_atomically(data: Union[str, bytes], path: Union[str, Path]) -> None:
    """Write a file that appears complete or not at all, through a temporary one beside it.

    Args:
        data: Text, which is written as UTF-8, or bytes.
        path: File to create or replace; its folder must exist.

    Raises:
        OSError: It cannot be written; a former file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}-{uuid.uuid4().hex[:8]}')
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(folder: Union[str, Path], names: Collection[str]) -> None:
    """Require that a folder does not exist or holds nothing beyond `names`.

    Args:
        folder: Folder that is to be replaced.
        names: Names of the files and folders that may be lost with it.

    Raises:
        OutputError: There is something else in it, or it is a file.
    """
    folder = Path(folder)
    if folder.is_dir():
        strange = sorted(p.name for p in folder.iterdir() if p.name not in names)
        if strange:
            raise OutputError(
                f'{folder}: holds {strange[0]!r}, which does not belong there, and would be replaced as a whole.'
                f' Choose another folder, or move {strange[0]!r} away.')
    elif folder.exists() or folder.is_symlink():
        raise OutputError(f'{folder}: is a file, must be a folder.')


@contextmanager
def replace_folder(folder: Union[str, Path], names: Collection[str], keep: str = '') -> Iterator[Path]:
    """Fill a temporary folder beside `folder`, which takes its place when all has gone well.

    Until then a former `folder` is not touched. On an exception the temporary folder is removed, unless it already
    holds something too dear to lose.

    Args:
        folder: Folder to create or replace; its parents are created.
        names: Names of the files and folders that may be replaced, see `check_replaceable`.
        keep: Name of a file or folder in the temporary folder whose presence saves it on an exception.

    Yields:
        The temporary folder, empty.

    Raises:
        OutputError: `folder` holds something that is not in `names`.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder, names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    suffix = uuid.uuid4().hex[:8]
    temporary = folder.with_name(f'.{folder.name}-{suffix}')
    temporary.mkdir()
    try:
        yield temporary
        check_replaceable(folder, names)
    except BaseException:
        if keep and (temporary / keep).exists():
            _logger.warning('%s was not finished; what had been saved until then is in %s', folder, temporary)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    move_into_place(temporary, folder)


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
    former = folder.with_name(f'.{folder.name}-{uuid.uuid4().hex[:8]}-former')
    folder.rename(former)
    try:
        temporary.rename(folder)
    except OSError:
        former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)
