"""Names in pictures: what the fonts of this machine can write."""
import textwrap
import warnings
from functools import cache
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

from PIL import ImageFont

from ._extras import require
from ._images import printable

_BASE = 'DejaVu Sans'  # which matplotlib brings


@cache
def _characters(file: str) -> Set[int]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return set(require('matplotlib.ft2font').FT2Font(file).get_charmap())
        except (RuntimeError, OSError):  # a broken font
            return set()


def _fonts() -> Iterator[Any]:
    """The fonts of this machine, as matplotlib finds them: the usual one first."""
    manager = require('matplotlib.font_manager')
    yield manager.FontEntry(fname=manager.findfont(_BASE), name=_BASE)
    # matplotlib's font of last resort has boxes for all characters
    yield from (f for f in manager.fontManager.ttflist if f.name and not f.name.startswith('Last Resort'))


@cache
def _font_of(character: str) -> Optional[str]:
    """A font of this machine that has a character, None if there is none."""
    return next((f.name for f in _fonts() if ord(character) in _characters(f.fname)), None)


def families_for(texts: Iterable[str]) -> Tuple[str, ...]:
    """Fonts that together have all characters of texts, as far as this machine has any; the usual one first."""
    found = {_font_of(c) for c in set(''.join(texts)) if c != '\n'}
    return (_BASE, *sorted(found - {_BASE, None}))


@cache
def font_for(text: str, size: int) -> Any:
    """Pillow's font, of so many pixels, that has all characters of a line of text; None if this machine has none."""
    try:
        file = next((f.fname for f in _fonts() if {ord(c) for c in text} <= _characters(f.fname)), None)
    except ImportError:  # nobody knows what Pillow's own font has not
        return ImageFont.load_default(size)
    return None if file is None else ImageFont.truetype(file, size)


def shorten(name: str) -> str:
    """A name in at most 18 characters, all of which can be printed."""
    name = printable(name)
    if len(name) > 18:
        words = textwrap.shorten(name, 18, placeholder='…') if ' ' in name else ''
        name = words if len(words) > 1 else f'{name[:17]}…'
    return name


def legible(names: Sequence[str], numbers: Optional[Sequence[int]] = None) -> List[str]:
    """Names of classes for a figure: short, and `class 7` where this machine has no font for some.

    Args:
        names: Any.
        numbers: Those of the classes; their places if None.
    """
    shown = [shorten(name) for name in names]
    numbers = range(len(names)) if numbers is None else numbers
    return [x if all(_font_of(c) for c in x) else f'class {i}' for i, x in zip(numbers, shown, strict=True)]
