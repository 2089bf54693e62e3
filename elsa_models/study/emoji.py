"""Getting the emoji: two npm packages of Cal Henderson's emoji-data, with both artists' pictures and Unicode's classes.

Noto's pictures (`emoji-datasource-google`) are under the Apache License 2.0, Twemoji's (`emoji-datasource-twitter`)
under CC-BY 4.0, the data about them under the MIT License. None of it comes with this package.
"""
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Optional, Sequence

from .._files import replace_folder
from .._images import DataError
from .data import ARTISTS

VERSION = '16.0.0'
_SHA256 = {
    'google': 'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438',
    'twitter': 'f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877',
}
_LIST, _LICENCE = 'emoji.json', 'LICENSE'


def get_emoji(folder: Path, tarballs: Optional[Path] = None) -> None:
    """Fill a folder with `emoji.json`, its licence, and a folder of 64-pixel pictures of each artist.

    Args:
        folder: Folder to create or replace.
        tarballs: Folder of the packages' files, as `npm pack` writes them; None lets npm fetch them.

    Raises:
        DataError: A package cannot be had or is another.
        OutputError: The folder holds other things.
    """
    with replace_folder(folder, {*ARTISTS, _LIST, _LICENCE}) as new, tempfile.TemporaryDirectory() as fetched:
        for artist in ARTISTS:
            name = f'emoji-datasource-{artist}'
            path = (tarballs or Path(fetched)) / f'{name}-{VERSION}.tgz'
            if tarballs is None:
                _npm_pack(f'{name}@{VERSION}', Path(fetched))
            unpack(path, artist, new, _SHA256[artist])


def _npm_pack(package: str, folder: Path) -> None:
    command: Sequence[str] = ('npm', 'pack', '--silent', package)
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as e:
        raise DataError(
            f'{package}: npm cannot fetch it ({e}). Where there is a network, run {" ".join(command)!r}, and give the'
            f' folder of both files.') from e


def unpack(path: Path, artist: str, folder: Path, sha256: Optional[str] = None) -> None:
    """Take one artist's pictures, the list of emoji and its licence out of a package.

    Args:
        path: File of the package.
        artist: Whose it is.
        folder: Folder to write to.
        sha256: What the file's sum must be, None for any.

    Raises:
        DataError: The file cannot be read, or is another.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f'{path}: is not version {VERSION} of the package, whose SHA-256 is {sha256}.')
        (folder / artist).mkdir()
        pictures = f'package/img/{artist}/64/'
        with tarfile.open(path) as archive:
            for member in archive:
                is_picture = member.name.startswith(pictures) and member.name.endswith('.png')
                place = folder / artist if is_picture else folder
                if member.isfile() and (is_picture or member.name in (f'package/{_LIST}', f'package/{_LICENCE}')):
                    (place / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    except (OSError, tarfile.TarError) as e:
        raise DataError(f'{path}: cannot be read as a package ({e}).') from e
