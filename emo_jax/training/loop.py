"""How a run proceeds: set up, resume, step, log, evaluate, save."""

import contextlib
import dataclasses
import errno
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import optax
from jax.sharding import Mesh

from emo_jax.analysis import domain_structure, human, write_report
from emo_jax.config import Config
from emo_jax.data import TokenStore, heldout_batches, prepare_store, train_batches
from emo_jax.data.store import silent
from emo_jax.errors import UserError, require
from emo_jax.evaluation import HeldoutLoss, make_heldout_loss
from emo_jax.model import active_parameters, flops_per_token, total_parameters
from emo_jax.parallel import own_rows, processes, put_rows
from emo_jax.parallel.chips import peak_flops
from emo_jax.training.alarms import Alarms, message
from emo_jax.training.checkpoints import Checkpoints, same_run, saved_steps
from emo_jax.training.metrics import MetricsLog, Progress, check_wandb, to_numbers
from emo_jax.training.run_directory import RunDirectory
from emo_jax.training.start import check_origin, continue_run, initial_parameters
from emo_jax.training.step import TrainState, abstract_state, init_state, make_train_step, run_mesh, state_shardings


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: steps done.
      stopped_by: signal number that ended it early (the same command continues it); 0 where it finished.
      heldout: the last evaluation, None where interrupted.
      report: path of the run's `report.html`.
    """

    step: int
    stopped_by: int
    heldout: HeldoutLoss | None
    report: str

    @property
    def exit_status(self) -> int:
        """Of a program that ends so: SIGTERM is a preemption and no failure."""
        return 0 if self.stopped_by in (0, signal.SIGTERM) else 128 + self.stopped_by


def train(
    config: Config,
    run_dir: str | os.PathLike[str],
    log: Callable[[str], None] = print,
    profile: tuple[int, int] | None = None,
) -> Result:
    """Trains from the newest checkpoint in `run_dir`, or from the start, to `train.steps`.

    Ctrl-C and SIGTERM end it after the step in flight with a checkpoint. Inside a `parallel.processes.job` every
    process calls this alike; process 0 writes what is not a part of an array, and speaks.

    Args:
      config: of the run; validated before any work.
      run_dir: for everything the run leaves: a folder that all processes see, or `gs://BUCKET/NAME`.
      log: receives messages for people.
      profile: first and last step of a profiler trace, which goes to `profile/` in `run_dir`.

    Raises:
      UserError: on a config that cannot work, or that is not that of the run in `run_dir`; where another job is
        training in `run_dir`; where processes of one job differ in what they were given; where the guard gives up.
    """
    config.validate()
    check_wandb(config.train.wandb_project)
    directory = RunDirectory(run_dir)
    processes.agree(config.fields(), "give every process the same --config and the same overrides.")
    mesh = run_mesh(config)
    with directory.held(), _full_disk(directory.local):
        return _train(config, directory, mesh, log if processes.first() else silent, profile)


def _train(
    config: Config, directory: RunDirectory, mesh: Mesh, log: Callable[[str], None], profile: tuple[int, int] | None
) -> Result:
    if processes.first():
        _prepare_run(config, directory, log)
    store = _tokens(config, directory, log)
    if processes.first():
        (directory.home / "tokenizer.json").write_bytes(store.tokenizer_path.read_bytes())
    log(_summary(config, store, mesh))
    with contextlib.closing(Checkpoints(directory.home, config, store.tokenizer_hash)) as checkpoints:
        with processes.first_alone():  # rows of prepared tokens are kept beside the store
            batches = iter(train_batches(store, config.data, own_rows(mesh, config.data.batch_size), log))
        state = checkpoints.restore(mesh, batches, log)
        if state is None:
            params = None
            if config.train.init_from:
                log(f"Starting from the weights of {config.train.init_from}.")
                params = initial_parameters(config, state_shardings(config, mesh).params)
            state = init_state(config, mesh, params)
        else:
            log(f"Continuing from the checkpoint of step {int(state.step)}.")
        with contextlib.ExitStack() as opened:
            metrics = None
            if processes.first():
                log_files = MetricsLog(directory.local, int(state.step), config)
                metrics = opened.enter_context(contextlib.closing(log_files))
            return _Run(config, directory, mesh, store, checkpoints, metrics, profile).steps(state, batches)


def _prepare_run(config: Config, directory: RunDirectory, log: Callable[[str], None]) -> None:
    """What can be refused or copied before tokens are made."""
    run_dir = directory.home
    require(
        saved_steps(run_dir) != [0],
        f"{run_dir} holds a model's weights, not a run's state. Start a run from them: another --workdir, with "
        f"--config.train.init_from={run_dir}.",
    )
    fresh = not (run_dir / "config.json").exists()
    if config.train.continue_from and fresh:
        require(
            not directory.in_bucket,
            f"train.continue_from={config.train.continue_from!r} is copied into a folder, and --workdir={run_dir} is "
            "none; copy the whole run there, and leave train.continue_from empty.",
        )
        continue_run(config, directory.local, log)
    elif not saved_steps(run_dir):
        check_origin(config)
    same_run(run_dir, config)
    directory.fetch()


def _tokens(config: Config, directory: RunDirectory, log: Callable[[str], None]) -> TokenStore:
    """The run's tokens: made by process 0, and by those with a `data.cache_dir` of their own."""
    data = dataclasses.replace(config.data, tokenizer=config.tokenizer())
    with processes.first_alone():
        store = prepare_store(data, config.model.vocab_size, config.data.cache_dir or directory.local / "data", log)
    processes.agree(
        {"the tokens' fingerprint": store.fingerprint, "the tokenizer's hash": store.tokenizer_hash},
        "give all hosts the same text and tokenizer, or a data.cache_dir that they share.",
    )
    require(
        len(store.heldout) > 0,
        f"{store.directory} has no held-out documents to evaluate on; raise data.heldout_fraction="
        f"{config.data.heldout_fraction} or give more text, and delete that folder.",
    )
    return store


class _Run:
    """The loop of `train`: dispatches a step, then reads the metrics of the one before."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        mesh: Mesh,
        store: TokenStore,
        checkpoints: Checkpoints,
        metrics: MetricsLog | None,
        profile: tuple[int, int] | None,
    ):
        """`metrics` is None in processes that write and show nothing."""
        self.config, self.directory, self.mesh, self.store = config, directory, mesh, store
        self.checkpoints, self.metrics = checkpoints, metrics
        self.progress = Progress(config.train.steps, None if metrics else io.StringIO())
        self.heldout_loss = make_heldout_loss(config.model, mesh, store.domains, config.mesh)
        self.heldout: HeldoutLoss | None = None
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.profile, self.profiling = profile or (0, 0), False
        self.alarms = Alarms(config)
        for line in metrics.kept if metrics else ():
            self.alarms.update(line)
        self.reported, self.report_seconds = time.monotonic(), 0.0

    def steps(self, state: TrainState, batches: grain.DatasetIterator) -> Result:
        """Runs from `state` to the last step or a signal."""
        train, last = self.config.train, self.config.train.steps
        step_fn = make_train_step(self.config, self.mesh)
        done = saved = int(state.step)
        clock = _Clock()
        unread: tuple[int, Any] | None = None
        stopped_by = 0
        with _signals() as signal_before:
            while done < last and not (stopped_by := signal_before(done)):
                if done + 1 == self.profile[0]:
                    jax.profiler.start_trace(str(self.directory.local / "profile"))
                    self.profiling = True
                with clock.waiting():
                    rows = next(batches)
                batch = put_rows(rows, self.mesh, self.config.data.batch_size)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                if unread:
                    self._write(*unread, clock)
                done += 1
                unread = (done, metrics)
                if self.profiling and done == self.profile[1]:
                    self._end_profile(done, metrics)
                evaluate = done == last or (train.eval_every and done % train.eval_every == 0)
                save = done == last or done % train.checkpoint_every == 0
                if evaluate or save:  # the line of this step must stand before its checkpoint does
                    self._write(done, metrics, clock, state if evaluate else None)
                    unread = None
                if save:
                    self._save(state, batches)
                    saved = done
                if evaluate:
                    clock.restart()
            if self.profiling:
                self._end_profile(done, state)
            if unread:
                self._write(*unread, clock)
            if saved != done:
                self.progress.message(f"\nInterrupted: saving step {done} ...")
                self._save(state, batches)
        if done == last and self.heldout is None:  # a finished run, started again
            self.heldout = self._evaluate(state)
        self.checkpoints.wait()
        if self.metrics:
            self._report()
        return Result(done, stopped_by, self.heldout, str(self.directory.home / "report.html"))

    def _save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
        if self.metrics:
            self.directory.send()  # the log of these steps must be there before their checkpoint is
        self.checkpoints.save(state, batches)

    def _write(self, step: int, metrics: Any, clock: "_Clock", state: TrainState | None = None) -> None:
        """Logs a step; evaluates `state` first if given."""
        line = {"step": step} | to_numbers(metrics)
        if line["skipped_in_row"]:
            self._skipped(line)
        rate = clock.tick(self.tokens_per_step)
        if state is not None:
            self.heldout = self._evaluate(state)
        if self.metrics is None:
            return
        expert_load = line.get("routing", {}).pop("expert_load", None)
        if state is not None and self.heldout is not None:
            line["heldout"] = self.heldout.to_json()
            if structure := domain_structure(self.heldout.choices, self.store.domains):
                line["heldout"]["structure"] = structure
            if expert_load is not None:
                line["routing"]["expert_load"] = expert_load
        line["timing"] = {"tokens_per_second": rate, "seconds": clock.total, "data_wait": clock.wait_share}
        peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        if peak:
            flops = flops_per_token(self.config.model, self.config.data.sequence_length)
            line["timing"]["mfu"] = rate * flops / (peak * self.mesh.size)
        if step % self.config.train.log_every == 0 or state is not None:
            events = self.alarms.update(line)
            if events:
                line["alarms"] = events
            for event in events:
                self.progress.message(f"step {step}: {message(event)}")
            self.metrics.write(line)
        left = (self.config.train.steps - step) * self.tokens_per_step / max(rate, 1e-9)
        self.progress.show(step, line["cross_entropy"], rate, left)
        if self.heldout is not None and state is not None:
            unit = "label" if self.config.model.labels else "token"
            self.progress.message(
                f"step {step}: held-out loss {self.heldout.all.loss:.4f} nats/{unit} (no document pool)"
            )
        # The end of the loop writes the last one; between, it may cost a hundredth of the time.
        due = time.monotonic() - self.reported > max(60.0, 100 * self.report_seconds)
        if (due or state is not None) and step < self.config.train.steps:
            self._report()

    def _report(self) -> None:
        start = time.monotonic()
        write_report(self.directory.local)
        self.directory.send()
        self.reported = time.monotonic()
        self.report_seconds = self.reported - start

    def _end_profile(self, done: int, metrics: Any) -> None:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        self.profiling = False
        self.progress.message(
            f"Steps {self.profile[0]} to {done} are profiled: tensorboard --logdir "
            f"{self.directory.local / 'profile'} shows them, with the package xprof."
        )

    def _skipped(self, line: dict[str, Any]) -> None:
        """Tells of a skipped step, and ends a run that skips on and on; its last checkpoint is from before."""
        seen = f"loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}"
        self.progress.message(f"step {line['step']}: skipped ({seen}); {line['skipped']} so far")
        if line["skipped_in_row"] >= self.config.train.guard_patience:
            raise UserError(
                f"{line['skipped_in_row']} steps in a row were skipped, the last with {seen}. Continue from the last "
                "checkpoint in a new --workdir with a lower optimizer.learning_rate or a longer warm-up, look at the "
                "data of these steps, or raise train.guard_sigmas if they are healthy."
            )

    def _evaluate(self, state: TrainState) -> HeldoutLoss:
        rows = self.config.data.batch_size // self.config.train.microbatches
        batches = heldout_batches(self.store, self.config.data, rows, own_rows(self.mesh, rows))
        return self.heldout_loss(state.params, batches, rows=rows)


class _Clock:
    """Throughput of the last steps, smoothed; time spent in evaluations does not count."""

    def __init__(self) -> None:
        self.total = 0.0
        self._waited = 0.0
        self._rate: float | None = None
        self.wait_share = 0.0
        self._last: float | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def restart(self) -> None:
        """The next interval starts now."""
        self._last = time.perf_counter()
        self._waited = 0.0

    def tick(self, tokens: int) -> float:
        """Tokens a second, after another step of `tokens`; the first interval, a compilation, is not smoothed in."""
        now = time.perf_counter()
        if self._last is None:
            self._last = now
            return 0.0
        seconds = max(now - self._last, 1e-9)
        self.total += seconds
        self.wait_share, self._waited, self._last = min(self._waited / seconds, 1.0), 0.0, now
        rate = tokens / seconds
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        return self._rate


@contextlib.contextmanager
def _full_disk(run_dir: Path) -> Iterator[None]:
    """Says what a full disk means; whoever meets it first (log, report, Orbax) says it in words of its own."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and any(os.strerror(number) in str(error) for number in _NO_SPACE):
            raise UserError(
                f"The disk of {run_dir} is full ({str(error).strip().splitlines()[0][:200]}). Nothing complete is lost:"
                " free some space, and the same command goes on from the newest checkpoint."
            ) from error
        raise


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[int], int]]:
    """Yields a function that takes steps done and says which signal ends the run now; 0: none.

    After SIGINT or SIGTERM; a second SIGINT is a KeyboardInterrupt. Several processes agree on a step: JAX listens for
    SIGTERM in each of them, so SIGINT becomes one there.
    """
    received: list[int] = []
    several = processes.several()

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def before(step: int) -> int:
        if not several:
            return received[0] if received else 0
        if not processes.stop_reached(step):
            return 0
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end the process while it saves
        return (*received, signal.SIGTERM)[0]

    caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, handler) for number in caught}
    try:
        yield before
    finally:
        for number, old in handlers.items():
            signal.signal(number, old)


def _summary(config: Config, store: TokenStore, mesh: Mesh) -> str:
    tokens = len(store.train.tokens)
    needed = config.train.steps * config.data.batch_size * config.data.sequence_length
    part = ""
    if config.optimizer.lora_rank or config.optimizer.trainable_experts:
        moments = optax.tree.get(abstract_state(config, mesh).opt_state, "mu")  # LoRA's are of its factors
        part = f", {human(sum(leaf.size for leaf in jax.tree.leaves(moments)))} trained"
    return (
        f"Model: {human(total_parameters(config.model))} parameters, {human(active_parameters(config.model))} active "
        f"per token{part}; pool: {config.pool.kind}.\n"
        f"Data: {human(tokens)} training tokens in {len(store.domains)} domains; "
        f"{human(needed)} tokens in {config.train.steps} steps ({needed / max(tokens, 1):.2g} epochs).\n"
        f"Devices: {mesh.size} × {mesh.devices.flat[0].device_kind}."
    )
