"""Before any JAX operation: CPU only, with eight virtual devices."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs are let go with their module: with thousands of them loaded, the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """For modules whose time is the compiler's and whose claims are not about speed or the last bit."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by an entry whenever something is compiled; `clear` it once everything is warm."""
    counted: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        counted.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counted
    jax.monitoring.clear_event_listeners()
