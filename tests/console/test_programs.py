"""Tests of where compiled programs are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxspec.console import programs
from jaxspec.console.programs import FOLDER, MOST, keep_programs, processor


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the user's, and an environment that names no folder of programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (FOLDER, MOST):
        # Set first, so that what the code sets is undone too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_programs_lie_in_the_users_cache_by_processor(home):
    keep_programs()
    folder = Path(os.environ[FOLDER])
    assert folder == home / "jaxspec" / "programs" / processor() and folder.is_dir()
    assert int(os.environ[MOST]) == programs.MOST_BYTES
    assert len(processor()) == 12 and processor() == processor()


def test_a_folder_that_the_user_names_is_left_alone(home, monkeypatch):
    monkeypatch.setenv(FOLDER, "elsewhere")
    keep_programs()
    assert os.environ[FOLDER] == "elsewhere" and MOST not in os.environ and not list(home.iterdir())


def test_a_cache_that_cannot_be_written_is_none(home, monkeypatch):
    (home / "jaxspec").write_text("a file where the folder would be")
    keep_programs()
    assert FOLDER not in os.environ


def test_without_the_lock_nothing_is_kept(home, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    keep_programs()
    assert FOLDER not in os.environ


def test_a_second_run_reads_what_the_first_compiled(home):
    code = (
        "from jaxspec.console.programs import keep_programs; keep_programs()\n"
        "import jax, jax.numpy as jnp\n"
        "hits = []\n"
        "listen = lambda name, **_: hits.append(name) if 'cache_hits' in name else None\n"
        "jax.monitoring.register_event_listener(listen)\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(8)).block_until_ready()\n"
        "print(len(hits))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)}
    told = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert int(told[0]) == 0 < int(told[1])
