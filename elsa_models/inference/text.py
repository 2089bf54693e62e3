"""Tables for a person."""
import csv
import io
from pathlib import Path
from typing import Any, Iterable, Sequence, Union

from .._files import write_atomically

_FORMULAS = ('=', '+', '-', '@', '\t', '\r')  # what spreadsheets take for one


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
