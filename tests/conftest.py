"""What every test shares: no network beyond this machine, no user's caches, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="armm-tests-")
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a test process for each core: more threads would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_browser() -> bool:
    browsers = ("chromium", "chromium-browser", "google-chrome")
    return shutil.which("chromedriver") is not None and any(map(shutil.which, browsers))


NEEDS = {"gpu": _has_cuda, "browser": _has_browser}


def pytest_collection_modifyitems(config, items):
    """Leaves tests out that are marked with a need that this machine does not meet."""
    for marker, is_met in NEEDS.items():
        left_out = [item for item in items if item.get_closest_marker(marker)]
        if left_out and not is_met():
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """A connection that would leave this machine is an error in the test that tries it."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(host).startswith(LOOPBACK):
            raise RuntimeError(f"a test tried to reach {address}: tests use no network")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


def pytest_unconfigure(config):
    _CACHE.cleanup()
