"""Several processes of one program: how a process joins the others, and how they end together.

Processes learn of each other from flags, from the environment, or from the cluster that JAX finds. From then on they
end together: where one fails, all stop with its message; where one is lost, all others stop within the heartbeat
timeout and say so. No process waits for a collective operation that cannot finish.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax

from jaxspec.console import cli
from jaxspec.parallel.agreement import FOREVER_MS, agree, meet, process_state

VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
"""Flag -> environment variable that replaces it where it is not given."""

GRACE_SECONDS = 10
"""Time by which JAX's own timeout comes after ours, and that process 0 gives the others to leave."""

NEWS_SECONDS = 2
"""Time for news of another process to arrive."""

FAILURE, LEFT = "jaxspec/failure", "jaxspec/left"
"""Keys in the coordination service's store: the first failure, and the processes that have left because of it."""

FIRST_LOST = "process 0 was lost (it does not answer any more)"

NOT_JOINED = (
    "(JAX found a cluster in the environment but could not join it: give --coordinator, --processes and --process, or "
    "--processes 1 to run alone)"
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The flags of every verb that can run in several processes."""

    coordinator: str | None = None
    """HOST:PORT of process 0, which all others must reach; with it go --processes and --process. Default: the
    environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else what JAX finds by itself (Cloud
    TPU, GKE, SLURM, Open MPI), else this process alone."""
    processes: int | None = None
    """How many processes there are. 1: this process alone, whatever the environment says."""
    process: int | None = None
    """Which of them this is, counted from 0."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as lost and all others stop."""
    join_timeout: int = 300
    """Seconds to wait at the start until all processes are there."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "processes", "heartbeat_timeout", "join_timeout")
        place_of(self)


class Place(NamedTuple):
    """The number of a process among all of them."""

    coordinator: str
    """HOST:PORT of process 0; empty for a process alone."""
    processes: int
    process: int


ALONE = Place("", 1, 0)
"""The place of a process without others."""


def place_of(how: Launch) -> Place | None:
    """Returns the place that the flags give this process; for missing flags the environment counts.

    None: JAX must look for it. Raises `cli.WrongUsage` where the flags do not fit together.
    """
    processes, process = _number("processes", how.processes), _number("process", how.process)
    if processes is None and process is None:
        if how.coordinator is not None:
            raise cli.WrongUsage("--coordinator needs --processes and --process: how many there are, and which this is")
        return None
    if processes is None or (process is None and processes > 1):
        raise cli.WrongUsage("--processes and --process go together: say how many there are, and which of them this is")
    process = process or 0
    if not 0 <= process < processes:
        raise cli.WrongUsage(f"--process is {process}; of {processes} processes it must be from 0 to {processes - 1}")
    if processes == 1:
        return ALONE
    coordinator = how.coordinator or os.environ.get(VARIABLES["coordinator"])
    if coordinator is None:
        raise cli.WrongUsage("--processes needs --coordinator: give HOST:PORT of process 0, the same to all")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise cli.WrongUsage(f"--coordinator is {coordinator!r}; it must be HOST:PORT, such as 10.0.0.2:8476")
    return Place(coordinator, processes, process)


def _number(flag: str, given: int | None) -> int | None:
    """Returns the value of a flag, or of its environment variable."""
    text = os.environ.get(VARIABLES[flag])
    if given is not None or text is None:
        return given
    if not text.isdecimal() or (flag == "processes" and int(text) < 1):
        raise cli.WrongUsage(f"{VARIABLES[flag]} is {text!r}; it must be a whole number, as --{flag} takes it")
    return int(text)


@contextmanager
def joined(how: Launch, *, prog: str) -> Iterator[None]:
    """Runs the body as one of the processes that `how` or the cluster names; a process alone just runs it.

    Several processes end together. A failure of the body ends all of them with its exit code; each names the process
    that failed and its message. The loss of a process ends all others with EXIT_PREEMPTED, because the same command
    goes on from the last checkpoint. Preemption (which all agree on) and success wait for the others.
    Raises ValueError where the processes cannot be joined.
    """
    if jax.distributed.is_initialized() or not _join(how, prog):
        yield
        return
    watch = _Watch(prog, how.heartbeat_timeout)
    try:
        agree("processes", {"processes": watch.processes}, "give all the same --processes")
        watch.tell(
            f"{watch.processes} processes are here; if one is lost, the others stop within {how.heartbeat_timeout} s"
        )
        yield
        meet("end")
    except cli.Preempted:
        watch.close()
        raise
    except (Exception, KeyboardInterrupt) as failure:
        watch.fail(failure)
    watch.close()


def refuse_several(prog: str, advice: str) -> None:
    """Raises ValueError, ending in `advice`, where this is one of several processes, joined or yet to be joined."""
    place = place_of(Launch())
    count = place.processes if place else jax.process_count()
    if count > 1:
        raise ValueError(f"{prog} runs in one process, and this is one of {count}: {advice}")


def _join(how: Launch, prog: str) -> bool:
    """Joins the other processes; returns whether there are any."""
    place = place_of(how)
    if place == ALONE:
        return False
    options: dict[str, Any] = {
        "initialization_timeout": how.join_timeout + GRACE_SECONDS,
        "heartbeat_timeout_seconds": how.heartbeat_timeout,
    }
    who = "this process" if place is None else f"process {place.process} of {place.processes}"
    at = "" if place is None else f" at {place.coordinator}"
    late = (
        f"{prog}: {who} waited {how.join_timeout} s{at}, and not all were there; start the same command on every host, "
        "or raise --join-timeout\n"
    )
    waiting = threading.Timer(how.join_timeout, _end, (cli.EXIT_PREEMPTED, late))  # JAX itself would abort
    waiting.daemon = True
    waiting.start()
    try:
        if place is None:
            return _join_found(options)
        if place.process == 0:
            _check_port(place.coordinator)
        sys.stderr.write(f"{prog}: {who} waits for the others{at}\n")
        address, processes, process = place
        jax.distributed.initialize(address, processes, process, cluster_detection_method="deactivate", **options)
        return True
    finally:
        waiting.cancel()


def _join_found(options: Mapping[str, Any]) -> bool:
    """Joins the processes of the cluster that JAX finds; returns False if it finds none, or a single process."""
    try:
        jax.distributed.initialize(**options)
    except ValueError as failure:
        if "coordinator_address should be defined" in str(failure):  # no cluster
            return False
        raise ValueError(f"{cli.sentence(failure)} {NOT_JOINED}") from failure
    except RuntimeError as failure:
        if "must be called before" in str(failure):  # the caller computes already, so it is alone
            return False
        raise ValueError(f"{cli.sentence(failure)} {NOT_JOINED}") from failure
    return process_state().num_processes > 1


def _check_port(coordinator: str) -> None:
    """Raises ValueError where process 0 cannot listen at the port of `coordinator`; JAX itself would crash."""
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as failure:
        raise ValueError(
            f"--coordinator {coordinator}: process 0 cannot listen at port {port} ({failure}); choose another"
        ) from failure


class _Watch:
    """Ends this process when another fails or is lost, and tells the others when this one fails.

    Three threads wait on the coordination service. One waits for the note of a failure. One waits at a barrier that no
    other process comes to, which breaks when a process stops sending heartbeats. One waits for the end of the service,
    which is the end of process 0. JAX aborts at these moments too, a little later and without a readable message.
    """

    def __init__(self, prog: str, heartbeat_timeout: int) -> None:
        state = process_state()
        self.prog, self.heartbeat_timeout = prog, heartbeat_timeout
        self.client, self.process, self.processes = state.client, state.process_id, state.num_processes
        self.coordinator = state.coordinator_address
        self.ending = False
        """Whether all work is done, so that other processes may go."""
        self.leaving = threading.Lock()
        waits = [self._await_failure, self._await_loss, *([self._await_first] if self.process else [])]
        self.threads = [threading.Thread(target=wait, daemon=True) for wait in waits]
        for thread in self.threads:
            thread.start()

    def tell(self, line: str) -> None:
        """Writes one line to the log, from process 0 alone."""
        if self.process == 0:
            sys.stderr.write(f"{self.prog}: {line}\n")

    def close(self) -> None:
        """Leaves together with the others, after all work is done."""
        self.ending = True
        jax.distributed.shutdown()  # wakes the threads: one still waiting at the interpreter's end would crash it
        for thread in self.threads:
            thread.join(GRACE_SECONDS)

    def fail(self, failure: BaseException) -> NoReturn:
        """Ends all processes for a failure of this one; ends this one if its failure shows that another has ended."""
        if _is_broken_off(failure):
            self._wait_for_news(failure)
        known = cli.verdict(failure)
        if known is None:
            traceback.print_exception(failure)
        code, reason = known or (cli.EXIT_FAILED, f"{type(failure).__name__}: {cli.sentence(failure)}")
        try:
            self.client.key_value_set(FAILURE, json.dumps([self.process, code, reason]))
        except jax.errors.JaxRuntimeError:  # another failed first, or process 0 is gone; the threads say so
            pass
        self._leave(code, f"process {self.process} of {self.processes}: {reason}")

    def _wait_for_news(self, failure: BaseException) -> None:
        """Lets the threads end this process if another failed or is lost; a broken connection needs no heartbeats."""
        if "Gloo" in str(failure):
            time.sleep(NEWS_SECONDS)
            self._lose(f"another process was lost ({cli.sentence(failure)})")
        time.sleep(self.heartbeat_timeout + NEWS_SECONDS)

    def _await_failure(self) -> None:
        """Waits for the note of a failure, and ends this process for it."""
        try:
            process, code, reason = json.loads(self.client.blocking_key_value_get(FAILURE, FOREVER_MS))
        except jax.errors.JaxRuntimeError:  # all is done, or process 0 is lost, which another thread says
            return
        if process != self.process:
            self._leave(code, f"stopped, for process {process} of {self.processes} failed: {reason}")

    def _await_loss(self) -> None:
        """Waits at a barrier of this process's own, which breaks when another process is lost."""
        try:
            self.client.wait_at_barrier(f"jaxspec/loss/{self.process}", FOREVER_MS)
        except jax.errors.JaxRuntimeError as broken:
            if self.ending:
                return
            silent = re.search(r"Task (\d+) heartbeat timeout", str(broken))
            if silent:
                self._lose(f"process {silent[1]} was lost (no heartbeat for {self.heartbeat_timeout} s)")
            if self.process and str(broken).startswith("UNAVAILABLE"):
                self._lose(FIRST_LOST)
            self._lose(f"another process was lost ({cli.sentence(broken)})")

    def _await_first(self) -> None:
        """Waits for the end of process 0: the port of its coordination service refuses connections then."""
        host, _, port = self.coordinator.rpartition(":")
        try:
            while not self.ending:
                with socket.create_connection((host.strip("[]"), int(port))) as line:
                    while line.recv(4096):  # the service sends nothing, and hangs up now and then
                        pass
                time.sleep(0.05)
        except ConnectionRefusedError:
            if not self.ending:
                self._lose(FIRST_LOST)
        except OSError:  # says nothing about process 0; heartbeats do
            pass

    def _lose(self, what: str) -> NoReturn:
        """Ends this process because another is lost."""
        self._leave(
            cli.EXIT_PREEMPTED, f"stopped, for {what}; start all {self.processes} processes again with the same command"
        )

    def _leave(self, code: int, line: str) -> NoReturn:
        """Says why and ends this process; process 0, which runs the coordination service, ends after the others."""
        self.leaving.acquire()  # never released: the first thread that leaves ends the process
        sys.stderr.write(f"{self.prog}: {line}\n")
        if code == cli.EXIT_PREEMPTED:
            time.sleep(0 if self.process else 0.05)  # the others learn of it now; soon JAX aborts all
        else:
            self._wait_for_others()
        _end(code)

    def _wait_for_others(self) -> None:
        """Notes that this process leaves; process 0 waits until all others have."""
        try:
            if self.process:
                self.client.key_value_set(f"{LEFT}/{self.process}", "")
                return
            patience = time.monotonic() + GRACE_SECONDS
            while len(self.client.key_value_dir_get(LEFT)) < self.processes - 1 and time.monotonic() < patience:
                time.sleep(0.1)
        except jax.errors.JaxRuntimeError:  # process 0 is gone already
            pass


def _is_broken_off(failure: BaseException) -> bool:
    """Returns whether a failure may come from an operation with other processes, one of which has ended."""
    codes = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")
    return isinstance(failure, RuntimeError | ValueError) and str(failure).startswith(codes)


def _end(code: int, line: str = "") -> NoReturn:
    """Ends the process at once; at an ordinary end JAX would wait for all others."""
    sys.stderr.write(line)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)
