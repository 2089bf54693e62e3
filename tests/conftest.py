import pytest
import torch


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
