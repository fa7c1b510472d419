"""The result of a program: one JSON object, with the machine it ran on."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec import __version__
from jaxspec.console.disk import REMEDIES


def machine_facts() -> dict[str, Any]:
    """Returns the processor, the cores that this process may use, the kind and count of accelerators, the jax version.

    `accelerator` is None on a machine without one. Starts the JAX backend.
    """
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "accelerator": None if on_cpu else devices[0].device_kind,
        "accelerator_count": 0 if on_cpu else len(devices),
        "jax": jax.__version__,
    }


def cpu_name() -> str:
    """Returns the model name of the processor, or its architecture if the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_sha() -> str | None:
    """Returns the commit of the checkout this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def versions() -> dict[str, Any]:
    """Returns the versions of all that computes here, and the machine; starts the JAX backend."""
    machine = machine_facts()
    return {
        "jaxspec": __version__,
        "commit": git_sha(),
        "jax": machine["jax"],
        "Python": platform.python_version(),
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "accelerator": machine["accelerator"],
    }


def result(command: str, *, dtype: Any, seed: int | None, started: float, **keys: Any) -> dict[str, Any]:
    """Returns the result of a verb: the keys common to all verbs, then its own `keys`.

    `started` is the value of `time.monotonic()` when the program began. `dtype` is a name or anything numpy takes.
    """
    return {
        "command": command,
        "version": __version__,
        "git_sha": git_sha(),
        "machine": machine_facts(),
        "dtype": dtype if isinstance(dtype, str) else np.dtype(dtype).name,
        "wall_seconds": time.monotonic() - started,
        "seed": seed,
        **keys,
    }


def file_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what tells a file on any machine: its name without folders, and its SHA-256."""
    with Path(path).open("rb") as file:
        return {"name": Path(path).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def jsonable(value: Any) -> Any:
    """Returns `value` in JSON's types: arrays become lists, paths strings, and numbers that are not finite None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        wide = array.astype(np.float64) if jax.numpy.issubdtype(array.dtype, jax.numpy.floating) else array
        return jsonable(wide.tolist())
    raise TypeError(f"a result cannot hold a {type(value).__name__}: {value!r}")


def json_text(value: Any, **options: Any) -> str:
    """Returns `value` as JSON, which has no NaN: where it holds numbers that are not finite, null stands for them."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # rare, so long lists are not walked for it
        return json.dumps(jsonable(value), allow_nan=False, **options)


def write_json(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes `result` to `path` in one rename and makes its folder. Raises `OSError` with one sentence on failure."""
    path = Path(path)
    text = json_text(jsonable(result), indent=2, ensure_ascii=False) + "\n"
    # A reader of `path` finds the old file or the whole new one.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as failure:
        remedy = REMEDIES.get(failure.errno or 0)
        advice = f"; {remedy}" if remedy else ""
        raise OSError(f"cannot write the result to {path}: {failure.strerror}{advice}") from failure


LONGEST = 200
"""Letters of a value that a difference shows."""


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns a line "a.b was x, is y" for every field in which two results of `config.to_dict` differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        fields = sorted(old.keys() | new.keys())
        return [line for f in fields for line in differences(old.get(f), new.get(f), f"{path}.{f}" if path else f)]
    if old == new:
        return []
    shown = [text if len(text := str(value)) <= LONGEST else f"{text[:LONGEST]}..." for value in (old, new)]
    return [f"{path} was {shown[0]}, is {shown[1]}"]
