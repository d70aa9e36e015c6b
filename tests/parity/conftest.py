"""Says which golden cases a run uses."""

from __future__ import annotations

import pytest
import torch
from harness import parity_root


def pytest_report_header() -> str:
    return f"golden cases: {parity_root()}"


@pytest.fixture(autouse=True)
def no_gradients():
    """Parity is about inference."""
    with torch.no_grad():
        yield
