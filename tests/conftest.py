import os

import pytest
import torch

os.environ.setdefault('NUMBA_NUM_THREADS', '4')  # read when Numba is imported: threads are tested on any machine


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
