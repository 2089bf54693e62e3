"""Operators among threads, forks and other users of Numba: right bits, and nothing hangs or dies.

Most of this runs in processes of its own, since what it guards against ends a process.
"""
import ctypes
import os
import sys
import textwrap
import threading

import programs
import pytest
import torch

from elsa_models.ops import _numba, _openmp, _threads
from elsa_models.ops.local_attention import eager, numba as numba_backend

PRELUDE = '''
    import os, sys, threading, time
    import numpy as np
    import torch
    from elsa_models.ops.local_attention import numba as backend

    def problem(seed=0):
        draw = torch.Generator().manual_seed(seed)
        shape = 2, 14, 15, 64
        value, grad, add = (torch.randn(s, generator=draw) for s in (shape, shape, (64, 5, 5)))
        return grad, value, torch.randn(2, 14, 15, 2, 25, generator=draw), None, add

    def solve(problem):
        grad, *tensors = problem
        results = [backend.forward(*tensors, 5, 1, True), *backend.backward(grad, *tensors, 5, 1, True)]
        return [x.numpy() for x in results if x is not None]

    def same(a, b):  # without PyTorch, whose threads a forked child has not got
        return all((x == y).all() for x, y in zip(a, b, strict=True))
'''


def _run(code, *arguments, **environment):
    """Run a program that has `problem`, which draws the arguments of an operator, and `solve`, all that it computes."""
    return programs.run(textwrap.dedent(PRELUDE) + textwrap.dedent(code), *arguments, **environment)


needs_numba = pytest.mark.skipif(_numba.why_not() is not None, reason='needs Numba')
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


# threads


@needs_numba
def test_pytorchs_number_of_threads_stays():
    _run('''
        torch.set_num_threads(2)
        solve(problem())
        assert torch.get_num_threads() == 2
        torch.set_num_threads(3)
        solve(problem())
        assert torch.get_num_threads() == 3
        from elsa_models.ops import _openmp, _threads
        assert _openmp.serves() or _threads._helpers.threads
        _openmp.serves = lambda: False  # where PyTorch's threads are not OpenMP's
        solve(problem())
        assert torch.get_num_threads() == 3 and _threads._helpers.threads
    ''', NUMBA_NUM_THREADS='16')


@pytest.mark.parametrize('backend', [pytest.param(numba_backend, marks=needs_numba, id='numba'),
                                     pytest.param(eager, id='torch')])
@pytest.mark.parametrize('kernel_size, ghosts', [(3, 'a'), (5, 'ma')])
@pytest.mark.parametrize('openmp', [True, False])
def test_same_bits_in_every_thread(backend, kernel_size, ghosts, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(_openmp, 'serves', lambda: False)
    shape, K = (3, 17, 18, 48), kernel_size
    value, grad, logits = torch.randn(shape), torch.randn(shape), torch.randn(3, 17, 18, 3, K * K)
    mul, add = (torch.randn(48, K, K) if x in ghosts else None for x in 'ma')
    results, errors = {}, []

    def solve(threads):
        try:
            torch.set_num_threads(threads)
            results[threading.current_thread().name, threads] = [
                backend.forward(value, logits, mul, add, K, 1, True),
                *backend.backward(grad, value, logits, mul, add, K, 1, True)]
        except BaseException as error:
            errors.append(error)

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            solve(threads)
            worker = threading.Thread(target=solve, args=(threads,), name='worker')
            worker.start()
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert not errors and len(results) == 6
    first, *rest = results.values()
    for result in rest:
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(result, first, strict=True))


needs_openmp = pytest.mark.skipif(
    sys.platform != 'linux' or 'OpenMP' not in torch.__config__.parallel_info(),
    reason='needs a PyTorch whose threads are OpenMP\'s')


@needs_openmp
@needs_numba
def test_no_threads_beside_pytorchs():
    _run('''
        from elsa_models.ops import _threads
        torch.set_num_threads(3)
        torch.randn(2 ** 20).exp()
        before = len(os.listdir('/proc/self/task'))
        solve(problem())
        assert len(os.listdir('/proc/self/task')) == before and not _threads._helpers.threads
    ''')


@needs_openmp
@needs_numba
def test_pytorchs_threads_get_all_arguments():
    # more than registers hold, of every kind, each thread in a row of its own
    import numba

    from elsa_models.ops import _simd

    @numba.njit(nogil=True)
    def kernel(words, a, b, c, d, e, f, g, h, yes, nothing, no):
        row = 1 + 10 * _simd.claim(words)
        for k, x in enumerate((a, b, c, d, e, f, g, h, int(yes), int(no))):
            _simd.put(words, row + k, x)

    words, kinds = (ctypes.c_int64 * 64)(), (*[numba.int64] * 9, numba.boolean, numba.none, numba.boolean)
    kernel.compile(kinds)
    result = kernel.overloads[kinds]
    code = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
    shared = _openmp.shared(code, (*[int] * 9, bool, None, bool))
    for threads in (1, 2, 5):
        shared((ctypes.addressof(words), *range(-3, 5), True, None, False), threads)
        assert 1 <= words[0] <= threads
        assert list(words)[1:1 + 10 * words[0]] == [*range(-3, 5), 1, 0] * words[0]
        ctypes.memset(words, 0, ctypes.sizeof(words))


def test_work_is_shared_and_done_once(monkeypatch):
    monkeypatch.setattr(_threads, '_helpers', _threads._Helpers())
    here, meeting = threading.current_thread(), threading.Barrier(4, timeout=20)
    seen = set()

    def run():
        seen.add(threading.current_thread())
        meeting.wait()

    for _ in range(3):  # with the same threads each time
        seen.clear()
        _threads.share(run, 4)
        assert len(seen) == 4 and here in seen
    assert len(_threads._helpers.threads) == 3


def test_nobody_waits_for_helpers_that_have_not_begun(monkeypatch):
    monkeypatch.setattr(_threads, '_helpers', _threads._Helpers())
    both, begun, end = threading.Barrier(2, timeout=20), threading.Event(), threading.Event()

    def occupy():
        both.wait()
        begun.set()
        end.wait(20)

    other = threading.Thread(target=_threads.share, args=(occupy, 2))
    other.start()
    assert begun.wait(20)
    calls = []
    _threads.share(lambda: calls.append(threading.current_thread()), 2)
    end.set()
    other.join()
    assert calls == [threading.current_thread()]


def test_an_error_waits_for_helpers(monkeypatch):
    monkeypatch.setattr(_threads, '_helpers', _threads._Helpers())
    here, both, ended = threading.current_thread(), threading.Barrier(2, timeout=20), []

    def run():
        both.wait()
        if threading.current_thread() is here:
            raise KeyboardInterrupt
        threading.Event().wait(.2)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        _threads.share(run, 2)
    assert ended


def test_no_more_threads_to_be_had(monkeypatch):
    monkeypatch.setattr(_threads, '_helpers', _threads._Helpers())

    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', start)
    calls = []
    _threads.share(lambda: calls.append(1), 3)
    assert calls == [1]


@needs_numba
def test_many_threads_train_and_infer_at_once():
    # beside foreign Numba code on the layer that ends the process where two threads enter it
    _run('''
        import concurrent.futures, resource, numba

        @numba.njit(parallel=True)
        def foreign(x):
            for i in numba.prange(x.size):
                x[i] = x[i] * .5

        torch.set_num_threads(2)
        problems = [problem(seed) for seed in range(4)]
        expected = [solve(p) for p in problems]
        stop = threading.Event()

        def others():
            x = np.ones(1000)
            while not stop.is_set():
                foreign(x)

        beside = threading.Thread(target=others)
        beside.start()
        for workers in (2, 7, 32):
            def work(i):
                torch.set_num_threads(1 + i % 3)  # changed meanwhile
                return same(solve(problems[i % 4]), expected[i % 4])
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                assert all(pool.map(work, range(4 * workers)))
        stop.set()
        beside.join()

        import asyncio
        async def serve():
            return await asyncio.gather(*(asyncio.to_thread(solve, p) for p in problems))
        assert all(map(same, asyncio.run(serve()), expected))

        torch.set_num_threads(3)
        for _ in range(300):
            solve(problems[0])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2000):
            solve(problems[0])
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 8 << 10, grown  # KiB
    ''', NUMBA_THREADING_LAYER='workqueue', NUMBA_NUM_THREADS='2')


# processes


@needs_numba
@needs_fork
def test_forks():
    # after a warm-up of ours, after foreign Numba code on OpenMP, by fork, Pool and the workers of a DataLoader
    _run('''
        import multiprocessing
        import numba

        @numba.njit(parallel=True)
        def foreign(x):
            for i in numba.prange(x.size):
                x[i] = x[i] * .5

        torch.set_num_threads(2)
        given = problem()
        expected = solve(given)
        foreign(np.ones(1000))

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return float(same(solve(given), expected))

        def check(i):
            torch.set_num_threads(1)
            return same(solve(given), expected)

        pid = os.fork()
        if pid == 0:
            from elsa_models.ops import _threads
            assert not _threads._helpers.threads
            y = backend.forward(*given[1:], 5, 1, True)  # backward sums by PyTorch, whose threads stayed behind
            os._exit(0 if (y.numpy() == expected[0]).all() and _threads._helpers.threads else 3)
        assert os.waitpid(pid, 0)[1] == 0
        with multiprocessing.get_context('fork').Pool(2) as pool:
            assert all(pool.map(check, range(4)))
        loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context='fork')
        assert all(x.item() == 1. for x in loader)
        assert same(solve(given), expected)
    ''', NUMBA_THREADING_LAYER='omp', NUMBA_NUM_THREADS='2')


@needs_numba
def test_a_spawned_worker():
    _run('''
        import multiprocessing
        given = problem()
        expected = solve(given)
        if __name__ == '__main__':
            # -c has no file to import again: the child gets functions of the package
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                grad, *tensors = given
                y = pool.apply(backend.forward, (*tensors, 5, 1, True))
            assert (y.numpy() == expected[0]).all()
    ''')


@needs_numba
@needs_fork
def test_a_fork_during_the_first_compilation(tmp_path):
    _run('''
        given = problem()
        results = []
        thread = threading.Thread(target=lambda: results.append(solve(given)))
        thread.start()
        lock = backend._numba._compiling
        while lock.acquire(blocking=False):
            lock.release()
            time.sleep(.002)
        pid = os.fork()
        if pid == 0:
            mine = solve(given)
            os._exit(0 if np.isfinite(mine[0]).all() else 3)
        assert os.waitpid(pid, 0)[1] == 0
        thread.join()
        assert same(results[0], solve(given))
    ''', NUMBA_CACHE_DIR=str(tmp_path))


@needs_numba
def test_processes_on_one_empty_cache(tmp_path):
    # both compile the same functions for the same types, in opposite orders
    code = textwrap.dedent(PRELUDE) + textwrap.dedent('''
        given = problem()
        tasks = [lambda: solve(given), lambda: [backend.forward(*given[1:3], None, None, 5, 1, True).numpy()]]
        for task in tasks if sys.argv[1] == '0' else tasks[::-1]:
            task()
        np.save(sys.argv[2], np.concatenate([x.ravel() for task in tasks for x in task()]))
    ''')
    cache = str(tmp_path / 'cache')
    both = [programs.start(code, i, tmp_path / f'{i}.npy', NUMBA_CACHE_DIR=cache) for i in range(2)]
    for process in both:
        programs.finish(process)
    programs.run(code, 0, tmp_path / '2.npy', NUMBA_CACHE_DIR=cache)  # what they left is good for others
    results = [(tmp_path / f'{i}.npy').read_bytes() for i in range(3)]
    assert results[0] == results[1] == results[2]
