"""Before any JAX operation: CPU only, eight virtual devices, programs compiled quickly and kept for the next run."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
MOST_PROGRAM_BYTES = 2**30
MOST_WORKERS = 4
FEW_FILES = 20
OLDER_EMITTER = "xla_cpu_use_fusion_emitters"


def count_files(config: pytest.Config) -> int:
    """Returns how many test files the command line names, by themselves or by a folder."""
    places = [Path(argument.split("::")[0]) for argument in config.args]
    return sum(place.is_file() or len(list(place.rglob("test_*.py"))) for place in places)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns a worker a core for the whole suite, and none for a package or for slow tests.

    A package runs in less time than workers start in, and slow tests measure: they want the machine for themselves.
    """
    if config.option.markexpr != "not slow" or count_files(config) <= FEW_FILES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def knows(flag: str) -> bool:
    """Returns whether this version of XLA has a flag: it ends the process at one that it does not know."""
    for library in Path(jaxlib.__file__).parent.glob("*.so"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            if code.find(flag.encode()) >= 0:
                return True
    return False


def compile_quickly() -> None:
    """Nine tenths of the suite's time would be XLA's, which optimizes programs that run for milliseconds.

    Without that, and with its older emitter, it compiles four times as fast. Processes that tests start take both from
    the environment.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    if "XLA_FLAGS" not in os.environ and knows(OLDER_EMITTER):
        os.environ["XLA_FLAGS"] = f"--{OLDER_EMITTER}=false"


def pytest_configure(config: pytest.Config) -> None:
    """Slow tests run what users run; the others are compiled quickly.

    Workers, modules and processes that tests start share compiled programs by a folder, and so do later runs.
    """
    if config.option.markexpr == "not slow":
        compile_quickly()
    cache = getattr(config, "cache", None)
    if PROGRAMS not in os.environ and cache is not None:
        folder = cache.mkdir("programs")
        files = [file for file in folder.iterdir() if file.is_file()]
        # Programs of former code are never asked for again: once they are many, all go.
        if sum(file.stat().st_size for file in files) > MOST_PROGRAM_BYTES:
            for file in files:
                file.unlink(missing_ok=True)
        os.environ[PROGRAMS] = str(folder)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if PROGRAMS in os.environ:  # JAX has read the environment already
        jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs are let go with their module: with thousands of them loaded, the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compile_fully() -> Iterator[None]:
    """For modules whose programs run longer than they compile, or whose claims are about what the compiler makes."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def compile_afresh() -> Iterator[None]:
    """For modules that compile for absent chips, whose programs cannot be read back from the folder."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks only once whether to read
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by an entry whenever something is compiled or fetched; `clear` it once everything is warm."""
    counted: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        counted.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counted
    jax.monitoring.clear_event_listeners()
