"""Communication between the processes of a program: barriers, exchanged values, and checks that they agree."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxspec.console.results import differences

FOREVER_MS = 10 * 365 * 24 * 3600 * 1000
"""Ten years: the coordination service wants a timeout."""


def say(line: str) -> None:
    """Writes one line to the log, from process 0 alone."""
    if jax.process_index() == 0:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def meet(name: str) -> None:
    """Waits until all processes have called this with the same `name`; no two places in the program share a name."""
    state = process_state()
    if state.client is not None:
        state.client.wait_at_barrier(f"jaxspec/{name}", FOREVER_MS)


def exchange(name: str, value: Any) -> list[Any]:
    """Returns the JSON values that all processes give, by process; no two places in the program share a `name`."""
    state = process_state()
    if state.client is None:
        return [value]
    folder = f"jaxspec/{name}"
    state.client.key_value_set(f"{folder}/{state.process_id}", json.dumps(value), allow_overwrite=True)
    meet(name)
    found = {int(key.rpartition("/")[2]): text for key, text in state.client.key_value_dir_get(folder)}
    return [json.loads(found[i]) for i in sorted(found)]


def agree(name: str, facts: Mapping[str, Any], advice: str) -> None:
    """Checks that all processes have the same `facts` (JSON).

    Raises ValueError, which names a process that differs from process 0, where it differs, and the `advice`.
    """
    first, *others = exchange(name, dict(facts))
    for number, theirs in enumerate(others, 1):
        changed = differences(first, theirs)
        if changed:
            more = sum(x != first for x in others) - 1
            also = f", as do {more} more" if more else ""
            raise ValueError(f"process {number} differs from process 0 ({'; '.join(changed)}){also}: {advice}")


def check_shared(folder: str | Path) -> None:
    """Checks that all processes see the files that process 0 writes into the folder, which it makes if need be.

    Raises ValueError, which names a process that does not.
    """
    state, folder = process_state(), Path(folder)
    if state.client is None:
        return
    mark = folder / ".seen-by-all"
    if state.process_id == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(secrets.token_hex(), encoding="utf-8")
    meet(f"written/{folder.name}")
    seen = exchange(f"seen/{folder.name}", mark.read_text(encoding="utf-8") if mark.is_file() else None)
    if state.process_id == 0:
        mark.unlink()
    blind = [number for number, text in enumerate(seen) if text != seen[0]]
    if blind:
        raise ValueError(
            f"{folder}: process {blind[0]} does not see what process 0 writes there; give a folder that all processes "
            "share, on a network file system or in a mounted bucket"
        )


def process_state() -> Any:
    """Returns JAX's own record of the processes: `client`, `process_id`, `num_processes`."""
    # Private, but JAX offers the store and the barriers of its coordination service nowhere else. Orbax uses it too.
    from jax._src import distributed

    return distributed.global_state
