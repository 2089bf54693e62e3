"""Who computes an operator: the registry of operators with their backends, and the choice between them.

A backend is a module with `refuse(value)`, which says why it cannot serve a tensor or returns None, and the functions
that its operator calls. The choice is shared by all operators; every operator takes a `backend` for one call as well.
"""
from types import ModuleType
from typing import Dict, List, Optional, Tuple

import torch

__all__ = ['Operator', 'available_backends', 'explain_backend', 'get_backend', 'set_backend']

AUTO = 'auto'  # the first backend that serves
REFERENCE = 'reference'  # no kernel but the formula itself; never chosen unasked
META = 'torch'  # what tensors without data take, whatever is chosen: there is nothing to compute

_operators: Dict[str, 'Operator'] = {}
_choice = AUTO


class Operator:
    """An operator and the backends that compute it."""

    def __init__(self, name: str, backends: Dict[str, ModuleType]) -> None:
        """
        Args:
            name: What `explain_backend` calls the operator.
            backends: Modules by name, in order of preference; the last, 'torch', takes everything.
        """
        self.name = name
        self.backends = backends
        _operators[name] = self

    def explain(self, value: torch.Tensor) -> Dict[str, Optional[str]]:
        """Why each backend would refuse `value`, by name; None where it would serve."""
        return {name: backend.refuse(value) for name, backend in self.backends.items()}

    def select(self, value: torch.Tensor, backend: Optional[str] = None) -> str:
        """Name of the backend that computes this call.

        Args:
            value: A tensor of the call, the one that `refuse` looks at.
            backend: The caller's wish, a name that is known, which goes before the choice made by `set_backend`.

        Raises:
            RuntimeError: The backend was chosen by name and cannot serve.
        """
        choice = _choice if backend is None else backend
        if value.is_meta:
            return META
        if choice == AUTO:
            return next(name for name, module in self.backends.items() if module.refuse(value) is None)
        if choice == REFERENCE:
            return REFERENCE
        if choice in self.backends:
            reason = self.backends[choice].refuse(value)
        else:
            reason = f'{self.name} has no such backend.'
        if reason is not None:
            raise RuntimeError(f'backend {choice!r} was forced but cannot serve: {reason}')
        return choice


def available_backends() -> Tuple[str, ...]:
    """Names that `set_backend` takes, besides 'auto'."""
    names: List[str] = []
    for operator in _operators.values():
        names += [name for name in operator.backends if name not in names]
    return (*names, REFERENCE)


def set_backend(name: str = AUTO) -> None:
    """Choose what computes the operators from now on, in this process and all its threads.

    Args:
        name: 'auto' takes the first backend that serves the given tensors; any other name forces that backend, which
            then raises where it cannot serve. The environment variable `ELSA_BACKEND` sets the initial choice. To
            choose for one call alone, give its argument `backend`.

    Raises:
        ValueError: The name is not known.
    """
    global _choice
    check_name(name)
    _choice = name


def get_backend() -> str:
    """The name last given to `set_backend`, or the initial one."""
    return _choice


def explain_backend(value: torch.Tensor, operator: str = 'local_attention') -> Dict[str, Optional[str]]:
    """Why each backend of an operator would refuse `value`, by name; None where it would serve.

    Raises:
        ValueError: There is no such operator.
    """
    if operator not in _operators:
        known = ', '.join(map(repr, _operators))
        raise ValueError(f'operator: got {operator!r}, must be one of {known}.')
    return _operators[operator].explain(value)


def check_name(name: str) -> None:
    """Require that some operator has a backend of this name.

    Raises:
        ValueError: None has.
    """
    known_names = (AUTO, *available_backends())
    if name not in known_names:
        known = ', '.join(map(repr, known_names))
        raise ValueError(f'backend: got {name!r}, must be one of {known}.')
