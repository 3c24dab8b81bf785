"""The start of a process that loads models."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 100_000  # more than Python's 700 at a time before it looks for garbage


@contextmanager
def quick_start() -> Iterator[None]:
    """Around imports and the loading of models, or as a decorator of what does them: the same result in less time.

    Python looks for garbage again and again among the million objects that torch and transformers make, nearly all of
    which stay: a fifth of the time. Inside it looks rarely.

    scikit-learn is not there for what is imported inside: transformers would import it, wherever it is installed, for
    one metric that nothing here uses: a second in every process.
    """
    usual = gc.get_threshold()
    gc.set_threshold(_NEW_OBJECTS, *usual[1:])
    is_hidden = "sklearn" not in sys.modules
    if is_hidden:
        sys.modules["sklearn"] = None  # type: ignore[assignment]  # the import system's way to say so
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules["sklearn"]
        gc.set_threshold(*usual)


_first_loader: int | None = None  # the process that has loaded models, also in those that are forked from it


def refuse_fork() -> None:
    """Call before models are loaded or used.

    A forked process has none of the threads of the one before: it would wait for torch's forever, or crash.

    Raises:
        RuntimeError: this process was forked from one that had loaded models.
    """
    global _first_loader
    _first_loader = _first_loader or os.getpid()
    if _first_loader != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had loaded models, without the threads that they need: start it "
            "with multiprocessing.get_context('spawn')"
        )
