"""Gives back to the system what a process needed to start and does not need to serve."""

import contextlib
import ctypes
import gc


def give_back() -> None:
    """Return free memory, and leave what lives for good out of every later collection."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
