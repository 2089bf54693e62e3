import os

if 'PYTEST_XDIST_WORKER' in os.environ:  # processes share the cores, threads would only get in each other's way
    os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('NUMBA_NUM_THREADS', '4')  # read when Numba is imported: threads are tested on any machine

import pytest  # noqa: E402
import torch  # noqa: E402

# files that take longest, which xdist would begin by their number of tests: a few long ones at the very end
LONG = (
    'models/test_contract.py', 'training/test_processes.py', 'ops/test_local_attention.py', 'ops/test_triton.py',
    'test_export.py', 'timm_suite/test_timm_suite.py', 'scripts/test_train.py', 'models/test_elsa_swin.py',
)


def pytest_configure(config):
    """Whole files go to processes in the order of `pytest_collection_modifyitems`."""
    if hasattr(config.option, 'loadscopereorder'):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files first, so that processes end at about the same time."""
    def place(item):
        return next((i for i, name in enumerate(LONG) if item.path.as_posix().endswith(name)), len(LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def pytorchs_operators():
    """No kernels of ours."""
    from elsa_models import ops
    chosen = ops.get_backend()
    ops.set_backend('torch')
    yield
    ops.set_backend(chosen)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled by another test counts as a recompilation of this one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
