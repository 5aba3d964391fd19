"""Memory that was freed goes back to the machine while large tensors come and go.

glibc keeps freed blocks for the next ones once it has seen some as large: fast for activations, which are as large
again in the next step; while a model is read, what is kept can be as much again as the model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD, _BYTES, _GLIBC_MOST = -3, 256 << 10, 32 << 20


@contextmanager
def returned_when_freed(stays: bool = False) -> Iterator[None]:
    """Within it every block of a quarter MiB and more is the machine's again when it is freed, and all free memory is
    at the end; where the C library is not glibc nothing changes.

    Args:
        stays: blocks are returned so after it, too.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _BYTES)
    try:
        yield
    finally:
        if not stays:
            libc.mallopt(_M_MMAP_THRESHOLD, _GLIBC_MOST)
        libc.malloc_trim(0)
