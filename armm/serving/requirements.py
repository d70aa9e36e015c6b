"""What the page needs beside the library; cheap to import, so that a missing package is noticed before a model is loaded."""

from __future__ import annotations

import importlib.util

__all__ = ["require_gradio"]


def require_gradio() -> None:
    """An ImportError that names the way out where gradio is missing."""
    try:
        found = importlib.util.find_spec("gradio") is not None
    except ValueError:  # an entry of sys.modules without a spec
        found = False
    if not found:
        raise ImportError('the demo needs gradio, which is not installed: pip install "armm[demo]"')
