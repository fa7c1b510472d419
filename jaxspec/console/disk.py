"""Failures of a disk, told with the file that was written and what helps."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

_FULL = "free some space, and give the same command again"
_CLOSED = "give a place that can be written"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
}
"""Numbers of system errors -> what to do."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names `path` in an `OSError` of the block that names no file, as those of writing to an open file do."""
    try:
        yield
    except OSError as failure:
        if failure.filename is not None or failure.errno is None:
            raise
        raise OSError(failure.errno, os.strerror(failure.errno), str(path)) from failure
