"""The cache of released weights: one folder per weight, and in it a record that vouches for one file.

A file without a record is no weight, whatever its name: the record is written last, by a rename.
"""
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, Iterator, Optional, Union

import filelock
import safetensors.torch
import torch
from huggingface_hub import constants

from .._files import write_atomically
from ..models._checkpoint import WeightsError

_logger = logging.getLogger(__name__)

RECORD = 'weights.json'
_CHUNK = 1 << 20  # bytes
_LOCK_REPORT = 10.  # seconds of waiting between two lines in the log


def cache_root(cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """The folder of the cache: `ELSA_CACHE`, or `elsa_models` in `cache_dir` or in huggingface_hub's `HF_HOME`.

    Args:
        cache_dir: The folder given to `timm.create_model`, which is asked first.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser() / 'elsa_models'
    own = os.environ.get('ELSA_CACHE')
    return Path(own).expanduser() if own else Path(constants.HF_HOME) / 'elsa_models'


def sha256_of(path: Union[str, Path]) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Record:
    """What a cache entry vouches for."""
    sha256: str  # of the file, which is named after it
    size: int  # in bytes
    source: str  # where it came from
    source_sha256: str  # of the file there, before conversion

    @property
    def file(self) -> str:
        """Name of the file in the entry's folder."""
        return f'{self.sha256}.safetensors'

    @classmethod
    def read(cls, path: Path) -> 'Record':
        """Read a record.

        Raises:
            ValueError: It is no record.
        """
        fields = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(fields, dict) or fields.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f'must hold {", ".join(cls.__dataclass_fields__)}')
        record = cls(**fields)
        # the name of the file is made of it
        if not isinstance(record.sha256, str) or not re.fullmatch('[0-9a-f]{64}', record.sha256):
            raise ValueError('sha256 must be 64 hexadecimal digits')
        return record


class CacheEntry:
    """One weight in the cache.

    `find` needs no lock and writes nothing; everything else is called under `lock`.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: The entry's own folder, created when something is written.
        """
        self.folder = folder

    @property
    def partial(self) -> Path:
        """Folder of unfinished downloads."""
        return self.folder / 'partial'

    def find(self) -> Optional[Path]:
        """The file, verified by size and sha256, or None if there is no entry.

        Raises:
            WeightsError: There is one, but not the file that it vouches for.
        """
        path = self.folder / RECORD
        try:
            record = Record.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as e:
            raise WeightsError(f'{path}: cannot be read ({e})') from e
        file = self.folder / record.file
        try:
            size = file.stat().st_size
            if size != record.size:
                raise WeightsError(f'{file}: has {size} bytes instead of {record.size}')
            actual = sha256_of(file)
        except OSError as e:
            raise WeightsError(f'{file}: cannot be read ({e})') from e
        if actual != record.sha256:
            raise WeightsError(f'{file}: is damaged, its sha256 is {actual}')
        return file

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing; the lock of a process that dies is free.

        Raises:
            OSError: The folder cannot be created or written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / '.lock')
        while True:
            try:
                lock.acquire(timeout=_LOCK_REPORT)
                break
            except filelock.Timeout:
                _logger.warning('Waiting for another process that fills %s', self.folder)
        try:
            yield
        finally:
            lock.release()

    def add_tensors(self, tensors: Dict[str, torch.Tensor], source: str, source_sha256: str) -> Path:
        """Make tensors the entry's file.

        Args:
            tensors: By name, on the CPU.
            source: Where they came from.
            source_sha256: Of the file there.
        """
        # entries that share memory are copied apart
        tensors = {k: x.clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}
        data = safetensors.torch.save(tensors, metadata={'format': 'pt'})
        # the digest is that of what was to be written, not of what the disk made of it
        record = Record(hashlib.sha256(data).hexdigest(), len(data), source, source_sha256)
        write_atomically(data, self.folder / record.file)
        return self._vouch(record)

    def add_file(self, path: Path, sha256: str, source: str) -> Path:
        """Make a safetensors file the entry's, linked if it is on the same disk and copied if not.

        Args:
            path: The file.
            sha256: Of the file.
            source: Where it came from.
        """
        record = Record(sha256, path.stat().st_size, source, sha256)
        temporary = self.folder / f'.{record.file}-{uuid.uuid4().hex[:8]}'
        try:
            try:
                os.link(path.resolve(), temporary)
            except OSError:
                shutil.copyfile(path, temporary)
            os.replace(temporary, self.folder / record.file)
        finally:
            temporary.unlink(missing_ok=True)
        return self._vouch(record)

    def _vouch(self, record: Record) -> Path:
        write_atomically(json.dumps(asdict(record), indent=2) + '\n', self.folder / RECORD)
        self.clean(record.file)
        path = self.find()
        if path is None:
            raise WeightsError(f'{self.folder}: was emptied while it was filled')
        return path

    def clean(self, keep: str = '') -> None:
        """Remove what a killed process has left, and files that nothing vouches for but `keep`."""
        for path in self.folder.iterdir():
            if path.name not in (RECORD, '.lock', self.partial.name, keep) and path.is_file():
                path.unlink()
        if keep:
            shutil.rmtree(self.partial, ignore_errors=True)


def cached_weights(cache_dir: Optional[Union[str, Path]] = None) -> Dict[str, str]:
    """Verify every entry of the cache.

    Args:
        cache_dir: As in `timm.create_model`.

    Returns:
        By name of the weight, 'ok', its source and its sha256, or what is wrong with it.
    """
    out = {}
    for path in sorted(cache_root(cache_dir).glob(f'*/{RECORD}')):
        try:
            file = CacheEntry(path.parent).find()
            out[path.parent.name] = f'ok, from {Record.read(path).source}, sha256 {file.stem}'
        except WeightsError as e:
            out[path.parent.name] = str(e)
    return out
