"""Machine code of kernels, kept on disk.

Numba's own cache asks whether the file of a kernel has changed, but not the files of what it calls; numbers its files,
so that two processes that compile at once may each find the other's code under their own number; and raises at a
damaged file. Here a kernel has one file for each set of argument types, whose name is a digest of all that the code
depends on and whose contents carry a digest of their own. What cannot be read is compiled, what cannot be written is
not kept.
"""
import hashlib
import logging
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

import llvmlite
import numba
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

_logger = logging.getLogger(__name__)


class KernelCache(_Cache):
    """What `numba.njit` asks for machine code of one function, and gives it to."""

    def __init__(self, function: Callable, sources: Sequence[Path]) -> None:
        """
        Args:
            function: The kernel.
            sources: All files of ours that its code comes from.
        """
        self._name = function.__name__
        texts = [path.read_bytes() for path in sources]
        self._source = _digest(*(hashlib.sha256(text).digest() for text in texts))
        self._places = list(_places(Path(function.__code__.co_filename)))
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(self._places[0])

    def load_overload(self, sig, target_context) -> Optional[CompileResult]:
        if not self._enabled:
            return None
        target_context.refresh()
        name = self._file_name(sig, target_context.codegen())
        for folder in self._places:
            try:
                content = (folder / name).read_bytes()
            except OSError:
                continue
            digest, payload = content[:32], content[32:]
            if hashlib.sha256(payload).digest() != digest:
                _logger.info('%s is damaged; compiling anew.', folder / name)
                continue
            try:
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
            except Exception as error:  # whatever another version may have left
                _logger.info('%s cannot be used (%r); compiling anew.', folder / name, error)
        _logger.info('Compiling the kernel %s for this CPU, which takes some seconds, once.', self._name)
        return None

    def save_overload(self, sig, cres: CompileResult) -> None:
        if not self._enabled:
            return
        name = self._file_name(sig, cres.codegen)
        payload = dumps(cres._reduce())
        content = hashlib.sha256(payload).digest() + payload
        errors = []
        for folder in self._places:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder / name, content)
                self._tidy(folder, name)
                return
            except OSError as error:
                errors.append(f'{folder}: {error}')
        _warn_not_kept('; '.join(errors))

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        for folder in self._places:
            for path in folder.glob(f'{self._name}-*.elsa'):
                path.unlink(missing_ok=True)

    def _file_name(self, sig, codegen) -> str:
        kind = _digest(repr(sig), repr(codegen.magic_tuple()), numba.__version__, llvmlite.__version__, sys.version)
        return f'{self._name}-{kind}-{self._source}.elsa'

    def _tidy(self, folder: Path, name: str) -> None:
        # what older sources of ours have left
        for path in folder.glob(f'{name.rpartition("-")[0]}-*.elsa'):
            if path.name != name:
                path.unlink(missing_ok=True)


def _places(file: Path) -> Iterator[Path]:
    """Folders to keep code in, the best first: Numba's if it is set, beside the package, the user's."""
    package = f'{file.parent.name}_{_digest(str(file.parent))}'
    chosen = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    if chosen:
        yield Path(chosen) / package
        return
    yield file.parent / '__pycache__'
    base = os.environ.get('LOCALAPPDATA') or os.environ.get('XDG_CACHE_HOME') or Path('~/.cache').expanduser()
    yield Path(base) / 'elsa_models' / 'kernels' / package


def _write(path: Path, content: bytes) -> None:
    """All of the file or nothing, whoever else writes it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name[:40]}-')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(*parts: object) -> str:
    text = '\n'.join(part.hex() if isinstance(part, bytes) else str(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _warn_not_kept(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        _logger.warning('Compiled kernels are not kept, every process compiles its own: %s', reason)


_warned = False
