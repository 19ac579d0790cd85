"""Several processes of one job: how they find one another, wait, agree and end together.

JAX ends every process of a job some time after one was lost, and names it by its number. Here whoever fails says so to
all others at once, and process 0 watches for those that no longer can; so each log ends with the cause.
"""

import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the coordination service has no public interface; Orbax takes it from here, too
from jax.experimental import multihost_utils

from emo_jax.errors import UserError, require

LOST_STATUS = 76
"""Exit status of a process whose job has lost another one."""
LOST_AFTER = 45.0
"""Seconds of silence after which a process counts as lost."""
INTERVAL = 1.0
"""Seconds between signs of life."""


class OwnError(Exception):
    """An error whose cause is certain to lie here, and which a new start mends: nobody else's is waited for."""


_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_ALIVE, _NAMES, _CAUSE = "emo_jax/alive/", "emo_jax/names/", "emo_jax/cause/"
_FOREVER_MS = 7 * 24 * 3600 * 1000  # whoever waits is ended if another is lost
_count = itertools.count()  # all processes wait and agree in the same order, so numbers are names enough


def first() -> bool:
    """Whether this is process 0, or the only one."""
    return distributed.global_state.process_id == 0


def several() -> bool:
    """Whether there are others."""
    return distributed.global_state.num_processes > 1


def wait() -> None:
    """Returns when every process has called it, however long that takes."""
    if several():
        _client().wait_at_barrier(f"emo_jax/wait/{next(_count)}", _FOREVER_MS)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 does what is inside before all others do, who then find what it has made, where they see it."""
    if not first():
        wait()
    yield
    if first():
        wait()


def agree(values: dict[str, Any], remedy: str) -> None:
    """Checks that all processes have the same values, given as JSON; returns when all have told theirs.

    Raises:
      UserError: where they have not: names the first value that differs, the first process where, and the remedy.
    """
    if not several():
        return
    client, folder = _client(), f"emo_jax/agree/{next(_count)}/"
    client.key_value_set(f"{folder}{distributed.global_state.process_id}", json.dumps(values))
    wait()
    told = sorted(_by_process(client.key_value_dir_get(folder)).items())
    ours = json.loads(told[0][1])
    for index, text in told[1:]:
        for name, theirs in json.loads(text).items():
            if theirs != ours[name]:
                names = _by_process(client.key_value_dir_get(_NAMES))
                raise UserError(f"{name} is {theirs!r} on {names[index]} and {ours[name]!r} on {names[0]}: {remedy}")


def stop_reached(step: int) -> bool:
    """Whether all processes stop before the step behind `step`, as one of them was told to by SIGTERM.

    Every process calls this once for each step; all are told at the same one.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)


def await_cause() -> None:
    """Ends this process if another one's end is why something failed here; else returns, some time later."""
    if several():
        time.sleep(LOST_AFTER + 2 * INTERVAL)


@contextlib.contextmanager
def job(log: Callable[[str], None] = print) -> Iterator[None]:
    """This process as one of a job, from meeting the others to ending with them.

    Where TPU pods, Slurm or Open MPI start processes, JAX finds the others; elsewhere `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` tell. To be entered before JAX looks for devices. An error inside ends the
    process, with the status that `emo_jax.cli` has for it, and the others with the same.

    Args:
      log: receives the names of all processes, or of this one and process 0.

    Raises:
      UserError: where the others cannot be found.
    """
    _join()
    watch = _Watch()
    names = [name for _, name in sorted(watch.names.items())]
    if first():
        log(f"A job of {len(names)} processes: {', '.join(names)}.")
    else:
        log(f"{watch.name[0].upper()}{watch.name[1:]} of {len(names)}. The job ends with {names[0]}.")
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    wait()
    watch.stop()
    jax.distributed.shutdown()


def _join() -> None:
    given = {name: os.environ[variable] for name, variable in _VARIABLES.items() if variable in os.environ}
    explicit = len(given) > 1 or "coordinator_address" in given
    missing = [variable for name, variable in _VARIABLES.items() if name not in given]
    require(
        not explicit or not missing,
        f"--distributed with {', '.join(_VARIABLES[name] for name in given)} set also needs {', '.join(missing)}.",
    )
    arguments: dict[str, Any] = dict(given)
    for name in ("num_processes", "process_id") if explicit else ():
        require(given[name].isdecimal(), f"{_VARIABLES[name]}={given[name]!r} must be a number.")
        arguments[name] = int(given[name])
    if explicit:
        index, count = arguments["process_id"], arguments["num_processes"]
        require(index < count, f"JAX_PROCESS_ID={index} must lie in 0..{count - 1}, as JAX_NUM_PROCESSES={count}.")
        require(
            ":" in given["coordinator_address"],
            f"JAX_COORDINATOR_ADDRESS={given['coordinator_address']!r} must be HOST:PORT, with a free port of "
            "process 0's host.",
        )
        arguments["cluster_detection_method"] = "deactivate"
        print(f"Process {index} of {count} meets the others at {given['coordinator_address']} ...", flush=True)
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise UserError(
            f"--distributed found no cluster ({error}). On TPU pods, under Slurm and under Open MPI, JAX finds the "
            f"other processes; elsewhere set {', '.join(_VARIABLES.values())}."
        ) from error


def _client() -> Any:
    return distributed.global_state.client


def _by_process(pairs: list[tuple[str, str]]) -> dict[int, str]:
    return {int(key.rsplit("/", 1)[1]): value for key, value in pairs}


class _Watch:
    """A thread that gives signs of life, and ends the process when the job has come to an end elsewhere."""

    def __init__(self) -> None:
        self.client, self._index = _client(), distributed.global_state.process_id
        self.name = f"process {self._index} ({platform.node()}, pid {os.getpid()})"
        self.client.key_value_set(f"{_NAMES}{self._index}", self.name)
        wait()
        self.names = _by_process(self.client.key_value_dir_get(_NAMES))
        self._failing: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="emo_jax watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process and, unless it is another one's end that has reached this one, the job."""
        sys.stdout.flush()
        if isinstance(error, UserError):
            status, text = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            status, text = 130, "interrupted"
        elif isinstance(error, OwnError):
            status, text = 1, str(error)
        elif isinstance(error, SystemExit):
            status, text = int(error.code or 0), f"ended with status {error.code}"
        else:
            traceback.print_exception(error)
            status, text = 1, (str(error).strip().splitlines() or [type(error).__name__])[0]
            await_cause()
        self._failing = text
        print(f"Error: {text}", file=sys.stderr, flush=True)
        self._tell(self._index, text, status)
        self._leave(status)

    def _tell(self, index: int, text: str, status: int) -> None:
        cause = json.dumps({"process": index, "text": text, "status": status})
        with contextlib.suppress(Exception):  # another was first
            self.client.key_value_set(f"{_CAUSE}0", cause)

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        for beat in itertools.count():
            try:
                self.client.key_value_set(f"{_ALIVE}{self._index}", str(beat), allow_overwrite=True)
                if self._index == 0:
                    self._look_for_lost(seen)
                causes = self.client.key_value_dir_get(_CAUSE)
            except Exception:  # process 0 has gone: JAX is about to end this one
                return
            if causes:
                self._end(json.loads(causes[0][1]))
            if self._stopped.wait(INTERVAL):
                return

    def _look_for_lost(self, seen: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        beats = {index: "" for index in self.names} | _by_process(self.client.key_value_dir_get(_ALIVE))
        for index, beat in beats.items():
            if seen.get(index, ("none", 0.0))[0] != beat:
                seen[index] = (beat, now)
            elif now - seen[index][1] > LOST_AFTER:
                self._tell(index, f"no sign of life for {LOST_AFTER:.0f} seconds", LOST_STATUS)

    def _end(self, cause: dict[str, Any]) -> None:
        if cause["process"] == self._index and self._failing:
            return  # the main thread is on its way out
        if cause["text"] != self._failing:
            name = self.names[cause["process"]]
            print(f"Error: the job has lost {name}: {cause['text']}", file=sys.stderr, flush=True)
        self._leave(cause["status"])

    def _leave(self, status: int) -> NoReturn:
        if self._index == 0:
            time.sleep(4 * INTERVAL)  # the others learn the cause from the service that lives here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the usual way out would wait for the others
