"""Packages that only training needs."""
import importlib
from types import ModuleType


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
        raise ImportError(f"The package {e.name!r} is not installed: pip install 'elsa_models[{extra}]'.") from e
