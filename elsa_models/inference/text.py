"""Names of classes in figures and tables, in any script."""
import csv
import io
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Iterable, List, Optional, Sequence, Set, Tuple, Union

from .._extras import require
from .._files import write_atomically
from .._images import printable

_BASE = 'DejaVu Sans'  # which matplotlib brings
_FORMULAS = ('=', '+', '-', '@', '\t', '\r')  # what spreadsheets take for one


@cache
def _characters(file: str) -> Set[int]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return set(require('matplotlib.ft2font').FT2Font(file).get_charmap())
        except (RuntimeError, OSError):  # a broken font
            return set()


@cache
def _font_of(character: str) -> Optional[str]:
    """A font of this machine that has a character, None if there is none."""
    manager = require('matplotlib.font_manager')
    fonts = [manager.FontEntry(manager.findfont(_BASE), _BASE), *manager.fontManager.ttflist]
    # matplotlib's font of last resort has boxes for all characters
    named = (f for f in fonts if f.name and not f.name.startswith('Last Resort'))
    return next((f.name for f in named if ord(character) in _characters(f.fname)), None)


def families_for(texts: Iterable[str]) -> Tuple[str, ...]:
    """Fonts that together have all characters of texts, as far as this machine has any; the usual one first."""
    found = {_font_of(c) for c in set(''.join(texts)) if c != '\n'}
    return (_BASE, *sorted(found - {_BASE, None}))


def shorten(name: str) -> str:
    """A name in at most 18 characters, of which none is taken for mathematics."""
    name = printable(name)
    if len(name) > 18:
        words = textwrap.shorten(name, 18, placeholder='…') if ' ' in name else ''
        name = words if len(words) > 1 else f'{name[:17]}…'
    return name.replace('$', r'\$')


def legible(names: Sequence[str]) -> List[str]:
    """Names for a figure: short, and numbered where this machine has no font for some of them."""
    shown = [shorten(name) for name in names]
    return [name if all(_font_of(c) for c in name) else f'class {i}' for i, name in enumerate(shown)]


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV. Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerows([safe_cell(cell) for cell in row] for row in rows)
    return out.getvalue()


def safe_cell(cell: Any) -> Any:
    """A cell that no spreadsheet computes."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) else cell


def write_csv(rows: Iterable[Sequence[Any]], path: Union[str, Path]) -> None:
    """Write rows as CSV, complete or not at all, see `to_csv`."""
    write_atomically(to_csv(rows), path)
