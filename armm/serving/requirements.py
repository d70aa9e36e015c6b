"""What the page needs: a package and a port; cheap to import, so that what is missing is noticed before a model is loaded."""

from __future__ import annotations

import errno
import importlib.util
import socket

__all__ = ["require_gradio", "usable_port"]


def require_gradio() -> None:
    """An ImportError that names the way out where gradio is missing."""
    try:
        found = importlib.util.find_spec("gradio") is not None
    except ValueError:  # an entry of sys.modules without a spec
        found = False
    if not found:
        raise ImportError('the demo needs gradio, which is not installed: pip install "armm[demo]"')


def usable_port(host: str, port: int) -> int:
    """`port`, or a free one where it is 0.

    Raises:
        ValueError: `host` is no address of this machine, or the port is taken or not allowed.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is taken: choose another one, or 0 for any that is free") from None
        if error.errno == errno.EACCES:
            raise ValueError(f"port {port} needs more rights than this process has: choose one from 1024 on") from None
        raise ValueError(f"{host!r} is no address of this machine: use 127.0.0.1, or 0.0.0.0 for all") from None
