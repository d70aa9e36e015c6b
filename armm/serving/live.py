"""Work that shows what it has while it goes on: a thread, and an iterator over what it shows."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Pace", "live"]

Show = Callable[[Any], None]


def live(work: Callable[[Show, threading.Event], Any], stop: threading.Event | None = None) -> Iterator[Any]:
    """Runs `work(show, stop)` in a thread and yields what it shows, then what it returns.

    An error of `work` is raised here. When nobody listens any more, `stop` is set, which the work is asked to look at.
    """
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event() if stop is None else stop

    def run() -> None:
        try:
            news.put(("result", work(lambda value: news.put(("shown", value)), stop)))
        except BaseException as error:  # handed over to the thread that listens
            news.put(("error", error))

    threading.Thread(target=run, name="armm-live", daemon=True).start()
    try:
        while True:
            kind, value = news.get()
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:
        stop.set()


class Pace:
    """How often to show something that takes time to show: so often that at most `share` of all time goes into it.

    Attributes:
        spent: seconds that showing took so far.
    """

    def __init__(self, share: float = 0.4, shortest: float = 0.05) -> None:
        self.share, self.shortest = share, shortest
        self.spent = 0.0
        self._next = 0.0

    @property
    def due(self) -> bool:
        return time.perf_counter() >= self._next

    def __enter__(self) -> Pace:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        now = time.perf_counter()
        took = now - self._start
        self.spent += took
        self._next = now + max(self.shortest, took * (1 - self.share) / self.share)
