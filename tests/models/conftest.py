"""Models compute by PyTorch's operators here: kernels, compiled for every type and width, have tests of their own.

The contract uses them where it stands for use.
"""
import pytest


@pytest.fixture(autouse=True)
def operators(pytorchs_operators):
    """As above."""
