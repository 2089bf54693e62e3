import os

if 'PYTEST_XDIST_WORKER' in os.environ:  # processes share the cores, threads would only get in each other's way
    os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('NUMBA_NUM_THREADS', '4')  # read when Numba is imported: threads are tested on any machine

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled by another test counts as a recompilation of this one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
