"""Stages as Apache Beam pipelines: elements are units of work, results are files.

Beam's local runner keeps collections in memory, so documents never travel through one; and a stage is a pipeline of
its own, so that the next begins with everything on disk, on any runner.
"""

import difflib
import logging
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

with_logging = logging.root.manager.disable
logging.disable(logging.WARNING)  # Beam tells on import which of its optional parts are not installed
import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions  # noqa: E402
from apache_beam.portability.api import beam_provision_api_pb2  # noqa: E402
from apache_beam.runners.portability.fn_api_runner import fn_runner  # noqa: E402
from apache_beam.runners.portability.portable_runner import JobServiceHandle  # noqa: E402
from apache_beam.transforms.environments import SubprocessSDKEnvironment  # noqa: E402

logging.disable(with_logging)

from emo_jax.data.arrays import index  # noqa: E402
from emo_jax.data.files import exists, list_folder, read_json, write_json  # noqa: E402
from emo_jax.data.stages import STOPPED, Job, dedup, scan, tokenize, work_file  # noqa: E402
from emo_jax.data.units import Unit  # noqa: E402
from emo_jax.errors import UserError, require  # noqa: E402

STAGES: dict[str, Callable[..., None]] = {"scan": scan, "dedup": dedup, "tokenize": tokenize, "index": index}
_LOCAL = ("", "DirectRunner")
_WATCH_SECONDS = 1.0


def pipeline_options(flags: Sequence[str], workers: int, names: Sequence[str] = ()) -> PipelineOptions:
    """Beam's options from flags that are not ours.

    Args:
      flags: as on a command line, such as `--runner=DataflowRunner`.
      workers: local processes; more than 1 is for Beam's local runner alone.
      names: of our own flags, to suggest.

    Raises:
      UserError: on a flag that Beam does not know either, or `workers` beside another runner.
    """
    known = PipelineOptions([]).get_all_options()
    for before, flag in zip(["", *flags], flags, strict=False):
        value = not flag.startswith("-") and before.startswith("--") and "=" not in before
        require(value or flag.startswith("-"), f"unexpected argument {flag!r}: every option starts with --")
    for name in PipelineOptions(list(flags)).get_all_options(retain_unknown_options=True):
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *names], n=1)
            hint = f" Did you mean --{near[0]}?" if near else " --help lists ours."
            raise UserError(f"There is no flag --{name}, neither here nor in Apache Beam.{hint}")
    options = PipelineOptions(list(flags))
    runner = options.view_as(StandardOptions).runner or ""
    require(workers >= 1, f"--workers={workers} must be at least 1.")
    if workers > 1:
        require(
            runner in _LOCAL,
            f"--workers={workers} is for this machine; {runner} has flags of its own, such as --num_workers.",
        )
        require(
            not any(flag.startswith(("--direct_num_workers", "--direct_running_mode")) for flag in flags),
            f"--workers={workers} is --direct_num_workers, as processes; drop --direct_…, or --workers.",
        )
        options = PipelineOptions([*flags, f"--direct_num_workers={workers}"])
    return options


def run_stage(
    stage: str,
    job: Job,
    elements: Sequence[tuple[int, Unit | None]],
    options: PipelineOptions,
    progress: Callable[[int], Any],
) -> None:
    """Does what is left of a stage.

    Args:
      stage: a name in `STAGES`.
      job: what every worker knows.
      elements: number and unit of each part that is not done yet; buckets have no unit.
      options: Beam's.
      progress: receives now and then how many parts are done in all.

    Raises:
      UserError: what the first part that met one raised.
    """
    out = job.config.out
    runner = options.view_as(StandardOptions).runner or ""
    local = runner in _LOCAL
    driver = (platform.node(), os.getpid()) if local else None
    done = threading.Event()
    watcher = threading.Thread(target=_report, args=(out, stage, done, progress), daemon=True)
    watcher.start()
    direct = options.view_as(DirectOptions)
    workers = direct.direct_num_workers
    try:
        if direct.direct_running_mode == "in_memory":
            direct.direct_num_workers = min(workers, len(elements))  # each takes seconds to start
        with beam.Pipeline(runner=_local_runner(options) if local else None, options=options) as pipeline:
            work = [(number, unit.to_json() if unit else None) for number, unit in elements]
            _ = pipeline | beam.Create(work) | beam.ParDo(_Work(stage, job, driver))
    finally:
        direct.direct_num_workers = workers
        done.set()
        watcher.join()
    if exists(f"{out}/{STOPPED}"):
        message = read_json(f"{out}/{STOPPED}")["message"]
        raise UserError(message) if message else KeyboardInterrupt


class _Work(beam.DoFn):
    """Does a unit of a stage; what it leaves is in files."""

    def __init__(self, stage: str, job: Job, driver: tuple[str, int] | None):
        self._stage, self._job, self._driver = stage, job, driver

    def setup(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is a core
        if self._driver and self._driver[0] == platform.node() and self._driver[1] != os.getpid():
            threading.Thread(target=_end_with, args=(self._driver[1],), daemon=True).start()

    def process(self, element: tuple[int, dict[str, Any] | None]) -> Iterator[None]:
        number, unit = element
        out = self._job.config.out
        if exists(f"{out}/{STOPPED}"):
            return
        try:
            arguments = [Unit.from_json(unit)] if unit else []
            STAGES[self._stage](self._job, number, *arguments)
        except UserError as error:
            write_json(out, STOPPED, {"message": str(error)})
        except KeyboardInterrupt:  # of a worker that is the program itself; Beam would make another error of it
            write_json(out, STOPPED, {"message": ""})
        except OSError as error:
            if not self._driver:
                raise  # a cluster tries again, on another machine
            where = f" ({error.filename})" if error.filename else ""
            message = f"{error.strerror or error}{where}: once that is put right, the same command goes on."
            write_json(out, STOPPED, {"message": message})  # on a full disk too: the unfinished file has gone
        yield from ()


def _end_with(driver: int) -> None:
    """Ends this process when that of the driver is gone: killed, it cannot tell its workers."""
    while True:
        try:
            os.kill(driver, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(_WATCH_SECONDS)


def _report(out: str, stage: str, done: threading.Event, progress: Callable[[int], Any]) -> None:
    folder = f"{out}/{os.path.dirname(work_file(stage, 0))}"
    seconds, before = 3.0, -1
    while not done.wait(seconds):
        now = sum(name.endswith(".json") for name in list_folder(folder))
        if now != before:
            progress(now)
        seconds, before = min(30.0, 1.3 * seconds), now


def _local_runner(options: PipelineOptions) -> Any:
    """Beam's local runner, chosen outright: `DirectRunner` would first try to download another one."""
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    direct = options.view_as(DirectOptions)
    if direct.direct_num_workers == 1 or direct.direct_running_mode != "in_memory":
        return fn_runner.FnApiRunner(provision_info=info)
    logging.getLogger(fn_runner.__name__).setLevel(logging.ERROR)  # it warns that one process has several workers
    command = f"{shlex.quote(sys.executable)} -m emo_jax.data.worker"
    environment = SubprocessSDKEnvironment.from_command_string(command_string=command)
    return fn_runner.FnApiRunner(default_environment=environment, provision_info=info)
