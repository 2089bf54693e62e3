"""Being asked to stop: Ctrl-C, or SIGTERM of Slurm, Kubernetes and machines that are taken away."""
import signal
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Iterator, Optional


class Stopped(KeyboardInterrupt):
    """A signal has ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    @property
    def status(self) -> int:
        """Exit status, as the shell gives it."""
        return 128 + self.number


class _State:
    asked: Optional[int] = None  # number of the signal
    waits: bool = False  # whether somebody looks at `asked` soon


_state = _State()


def _handle(number: int, frame: Optional[FrameType]) -> None:
    second = _state.asked is not None
    _state.asked = number
    if second or not _state.waits:
        raise Stopped(number)


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped`, once `between_steps` is left or at once if they come a second time."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return
    former = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    _state.asked = None
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _state.asked = None


@contextmanager
def between_steps() -> Iterator[None]:
    """Let a signal wait for somebody who looks at `asked_to_stop`."""
    _state.waits = True
    try:
        yield
    finally:
        _state.waits = False


def asked_to_stop() -> Optional[int]:
    """The signal that has come, None for none."""
    return _state.asked
