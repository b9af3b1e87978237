"""What holds for every test of training."""

import pytest
from helpers.scripts import reset_accelerate


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """No devices and no precision of the test before."""
    reset_accelerate()
    yield
    reset_accelerate()
