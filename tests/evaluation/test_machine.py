"""Times of programs are those of their work alone."""

import time

from jaxspec.evaluation.machine import TimedProgram, median_seconds

SLOW = 0.2


class SlowToFree:
    """A result that takes long to free, as a large cache does."""

    def __del__(self) -> None:
        time.sleep(SLOW)


def test_freeing_a_result_is_not_timed():
    assert TimedProgram(SlowToFree, ()).run() < SLOW / 2
    assert median_seconds(SlowToFree, repeats=1) < SLOW / 2
