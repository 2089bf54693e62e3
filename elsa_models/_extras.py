"""Packages that only parts of this one need: the extras of setup.cfg."""
import importlib
from types import ModuleType


def how_to_install(extra: str) -> str:
    """How to install the packages of an extra."""
    return f"pip install '.[{extra}]' in a clone of elsa_models"


def require(name: str, extra: str = 'train') -> ModuleType:
    """Import a package of an extra.

    Args:
        name: Module to import.
        extra: Extra of this package that installs it.

    Raises:
        ImportError: It is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(f'The package {e.name!r} is not installed. It comes with {how_to_install(extra)}.') from e
