"""Compiled programs kept from one run to the next, by JAX's own cache: a large target takes minutes to compile."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

FOLDER, MOST = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
"""JAX's own environment variables: the folder of the programs, and most bytes there."""
MOST_BYTES = 4 * 2**30
"""Bytes beyond which the programs that were used longest ago are removed."""


def keep_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache folder; to be called before JAX is imported.

    A folder that the user names is left to JAX. Where none can be written, programs are compiled in every run.
    """
    # JAX holds the folder below a size by the package filelock.
    if FOLDER in os.environ or importlib.util.find_spec("filelock") is None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "jaxspec" / "programs" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[FOLDER] = str(folder)
        os.environ.setdefault(MOST, str(MOST_BYTES))


def processor() -> str:
    """Returns a name of this kind of processor: homes are shared by machines, and XLA compiles for one kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kind = [platform.machine(), platform.processor(), *next(([x] for x in lines if x.startswith("flags")), [])]
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]
