"""Threads that share the work of one call.

The thread that calls does the work; others help where they come in time. Nobody waits for a thread that has not begun,
so that a call is never slower for threads that something else keeps busy. Threads belong to one process: a forked
child starts its own. What they run must be machine code that has let go of Python's interpreter lock.
"""
import os
import queue
import threading
from typing import Callable, List, Optional


class _Job:
    """A call that several threads run at once until no work is left."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run: Optional[Callable[[], object]] = run
        self.lock = threading.Lock()
        self.running = 0  # helpers that have begun and not ended
        self.idle = threading.Condition(self.lock)

    def help(self) -> None:
        with self.lock:
            run = self.run
            if run is None:  # the caller has done it all
                return
            self.running += 1
        try:
            run()
        finally:
            del run  # and with it the call's tensors
            with self.lock:
                self.running -= 1
                self.idle.notify()

    def close(self) -> None:
        """Let no more helpers in, and wait for those that are."""
        with self.lock:
            self.run = None
            while self.running:
                self.idle.wait()


class _Helpers:
    """Threads that wait for jobs, as many as were ever asked for at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.threads: List[threading.Thread] = []

    def call(self, job: _Job, count: int) -> None:
        if count > len(self.threads):
            self._start(count)
        for _ in range(min(count, len(self.threads))):
            self.jobs.put(job)

    def _start(self, count: int) -> None:
        with self.lock:
            while len(self.threads) < count:
                thread = threading.Thread(target=_serve, args=(self.jobs,), name='elsa_models', daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more, or Python is going down: fewer will do
                    return
                self.threads.append(thread)


def _serve(jobs: 'queue.SimpleQueue[_Job]') -> None:
    while True:
        jobs.get().help()


_helpers = _Helpers()


def _forget() -> None:
    global _helpers
    _helpers = _Helpers()  # the threads stayed with the parent, and its locks may be held


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget)


def share(run: Callable[[], object], threads: int) -> None:
    """Call `run` here and, at the same time, in up to `threads - 1` others; back when all have ended."""
    if threads < 2:
        run()
        return
    job = _Job(run)
    _helpers.call(job, threads - 1)
    try:
        run()
    finally:
        try:
            job.close()
        except BaseException:  # an interrupt; helpers still write to what the caller would give back
            job.close()
            raise
