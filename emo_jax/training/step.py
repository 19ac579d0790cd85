"""One jitted training step: forward, losses, gradients, update.

Letters: B rows, S sequence, L mixture layers, G documents a row.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emo_jax.config import Config
from emo_jax.kernels.experts import default_implementation
from emo_jax.model import (
    PoolDraws,
    abstract_parameters,
    bind,
    draw_noise,
    draw_pools,
    init_parameters,
    language_loss,
    logical_axes,
)
from emo_jax.parallel import TOKENS, batch_sharding, make_mesh, param_sharding, rank_load, replicated
from emo_jax.training.frozen import trained, trained_shardings, with_trained
from emo_jax.training.guard import choose, init_guard, judge
from emo_jax.training.loss import Counted, Sums, Tokens, add_to_buffers, combine, routing_metrics
from emo_jax.training.optimizer import learning_rate, make_optimizer

Batch = dict[str, jax.Array]
"""`tokens`, `targets`, `document_ids`, `positions` int32 [B, S]; `loss_mask` bool [B, S]."""


class TrainState(NamedTuple):
    """All that a step changes: a plain tree of arrays (or of their shapes, or of their shardings).

    Attributes:
      step: int32 scalar, steps done.
      params: nested dict, float32.
      opt_state: Optax's.
      guard: the memory of `training.guard`.
    """

    step: Any
    params: dict[str, Any]
    opt_state: Any
    guard: Any


def run_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a run's config asks for, over `devices` (default: all); see `make_mesh` for what it refuses."""
    rows = config.data.batch_size // config.train.microbatches
    experts = config.model.routed_experts
    return make_mesh(config.mesh, rows, devices, length=config.data.sequence_length, experts=experts)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Where each array of a `TrainState` lives: parameters by the rules table, moments with them.

    LoRA's factors and their moments, which are thin, are on every device.
    """
    abstract = abstract_parameters(config.model)
    params = jax.tree.map(
        lambda leaf, axes: param_sharding(mesh, axes, leaf.shape), abstract, logical_axes(config.model)
    )
    part = jax.eval_shape(functools.partial(trained, config.optimizer), abstract)
    optimizer = make_optimizer(config.optimizer, config.train.steps, config.train.seed)
    places = dict(jax.tree.leaves_with_path(trained_shardings(config.optimizer, params)))

    def place(path: tuple, _: Any) -> NamedSharding:
        """The path of a moment ends in that of its parameter, which only dictionaries lead to."""
        own = itertools.dropwhile(lambda key: not isinstance(key, jax.tree_util.DictKey), path)
        return places.get(tuple(own), replicated(mesh))

    opt_state = jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, part))
    guard = jax.tree.map(lambda _: replicated(mesh), jax.eval_shape(lambda: init_guard(config.train)))
    return TrainState(replicated(mesh), params, opt_state, guard)


def init_state(config: Config, mesh: Mesh, params: Any = None) -> TrainState:
    """The state before the first step, every array made where it lives; with random weights unless given `params`."""
    shardings = state_shardings(config, mesh)
    if params is None:
        params = init_parameters(config.model, config.train.seed, shardings.params)
    optimizer = make_optimizer(config.optimizer, config.train.steps, config.train.seed)
    init = jax.jit(lambda params: optimizer.init(trained(config.optimizer, params)), out_shardings=shardings.opt_state)
    opt_state = init(params)
    step, guard = jax.device_put((jnp.int32(0), init_guard(config.train)), (shardings.step, shardings.guard))
    return TrainState(step, params, opt_state, guard)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a `TrainState`, without making any of it."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, config.train.seed)
    params = abstract_parameters(config.model)
    step, guard = jax.eval_shape(lambda: (jnp.int32(0), init_guard(config.train)))
    opt_state = jax.eval_shape(lambda params: optimizer.init(trained(config.optimizer, params)), params)
    state = TrainState(step, params, opt_state, guard)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(config, mesh),
    )


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch."""
    shape = (config.data.batch_size, config.data.sequence_length)
    sharding = batch_sharding(mesh)
    names = ("tokens", "targets", "document_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in names}
    return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding)}


def make_gradients(
    config: Config, mesh: Mesh, implementation: str | None = None
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Builds (params, batch, step) → (gradients of what is `trained`, metrics), pure and meant to run under `jax.jit`.

    Args:
      config: of the run.
      mesh: where it runs.
      implementation: of `kernels.experts`; None: the platform's best.
    """
    implementation = implementation or default_implementation(mesh.devices.flat[0].platform)
    microbatches = config.train.microbatches
    layers = len(config.model.routed_experts)
    pooled = config.pool.kind != "none"

    def forward(part: Any, params: Any, batch: Batch, draws: PoolDraws | None) -> Sums:
        model = bind(config.model, with_trained(config.optimizer, params, part))
        hidden_BSD, routings = model(
            batch["tokens"],
            batch["document_ids"],
            batch["positions"],
            pool=config.pool,
            draws=draws,
            documents=config.data.max_documents,
            mesh=mesh,
            exchange=config.mesh,
            implementation=implementation,
            token_types_BS=batch.get("token_types"),
        )
        weight = config.train.logits_z_weight
        with jax.named_scope("loss"):
            language = language_loss(*model.readout(hidden_BSD), batch["targets"], batch["loss_mask"], weight, mesh)
        return Sums(language, tuple(r.totals for r in routings), tuple(r.load_NC for r in routings))

    def split(rows: tuple[Batch, PoolDraws | None]) -> tuple[Batch, PoolDraws | None]:
        """Rows [B, ...] as [microbatch, B / microbatches, ...], each microbatch over all devices."""

        def parts(x: jax.Array, spec: PartitionSpec) -> jax.Array:
            x = x.reshape(microbatches, -1, *x.shape[1:])
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *spec)))

        batch, draws = rows
        batch = jax.tree.map(lambda x: parts(x, TOKENS), batch)
        return batch, jax.tree.map(lambda x: parts(x, PartitionSpec(TOKENS[0])), draws)

    def join(stacked: Any) -> Any:
        """Microbatches as one set of rows."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)

    def whole_step(part: Any, params: Any, rows: tuple, tokens: Tokens) -> tuple[jax.Array, tuple]:
        """The loss from sums over the whole step: exact for the product f · p̄ of the global balance loss.

        Microbatches pass through a scan that keeps only their inputs, so memory is that of one
        microbatch; differentiating through it costs one more forward pass.
        """
        if microbatches == 1:
            sums = forward(part, params, *rows)
        else:
            run = jax.checkpoint(lambda some: forward(part, params, *some))
            language, *stacked = jax.lax.map(run, split(rows))
            sums = Sums(jax.tree.map(jnp.sum, language), *join(stacked))
        loss, parts = combine(config, sums, tokens)
        return loss, (parts, sums.routing, sums.loads)

    def accumulated(part: Any, params: Any, rows: tuple, tokens: Tokens) -> tuple:
        """Loss, parts, routing and gradients of scopes that a microbatch can see: its addends, summed."""

        def addend(part: Any, some: tuple, buffers: tuple[Counted, ...]) -> tuple[jax.Array, tuple]:
            sums = forward(part, params, *some)
            buffers = add_to_buffers(buffers, jax.lax.stop_gradient(sums.routing))
            used = buffers if config.balance.scope == "buffer" else None
            loss, parts = combine(config, sums, tokens, used)
            return loss, (parts, (sums.routing, sums.loads), buffers)

        def body(carry: Any, some: Any) -> Any:
            total, buffers = carry
            (loss, (parts, stacked, buffers)), grads = jax.value_and_grad(addend, has_aux=True)(part, some, buffers)
            return (jax.tree.map(jnp.add, total, grads), buffers), (loss, parts, stacked)

        dtype = jax.tree.leaves(part)[0].dtype
        empty = tuple(Counted(jnp.zeros(r, dtype), jnp.zeros((), dtype)) for r in config.model.routed_experts)
        start = (jax.tree.map(jnp.zeros_like, part), empty)
        (grads, _), (losses, parts, stacked) = jax.lax.scan(body, start, split(rows))
        return losses.sum(), jax.tree.map(lambda x: x.sum(0), parts), *join(stacked), grads

    def gradients(params: Any, batch: Batch, step: jax.Array) -> tuple[Any, dict[str, Any]]:
        draws = None
        if pooled:
            draws = draw_pools(
                config.pool,
                config.train.seed,
                step,
                rows=config.data.batch_size,
                layers=layers,
                documents=config.data.max_documents,
                experts=max(config.model.routed_experts),
            )
        if config.balance.gate_noise and config.model.split_layers:
            noise = config.balance.gate_noise / config.model.split_experts
            draws = draw_noise(draws, config.train.seed, step, noise, rows=config.data.batch_size, layers=layers)
        part, rows = trained(config.optimizer, params), (batch, draws)
        tokens = Tokens(batch["loss_mask"].sum(), (batch["document_ids"] > 0).sum())
        if microbatches == 1 or config.balance.scope == "global":
            compute = jax.value_and_grad(whole_step, has_aux=True)
            (loss, (parts, routing, loads)), grads = compute(part, params, rows, tokens)
        else:
            loss, parts, routing, loads, grads = accumulated(part, params, rows, tokens)
        metrics = {"loss": loss, "loss_tokens": tokens.loss, "grad_norm": optax.tree.norm(grads)}
        metrics |= {name: parts[name] for name in ("cross_entropy", "logits_z")}
        empty_BS = batch["document_ids"] == 0
        filtered_B = empty_BS.all(1)  # by the repetition filter: no row is all padding
        metrics["data"] = {"padding": (empty_BS & ~filtered_B[:, None]).mean(), "filtered_rows": filtered_B.mean()}
        if routing:
            layer_parts = {name: parts[name] for name in ("balance", "router_z")}
            metrics["routing"] = layer_parts | routing_metrics(jax.lax.stop_gradient(routing))
            if mesh.shape["expert"] > 1 and not config.model.split_layers:  # whose experts no token travels to
                positions = config.data.batch_size * config.data.sequence_length // (microbatches * mesh.size)
                choices = positions // config.mesh.chunks * config.model.num_choices
                by_layer = [rank_load(load_NC, mesh, choices, config.mesh.buffer) for load_NC in loads]
                names = ("rank_load_max_over_mean", "rank_rounds")
                metrics["exchange"] = dict(zip(names, jnp.stack(by_layer, axis=1), strict=True))
        return grads, metrics

    return gradients


def make_train_step(
    config: Config, mesh: Mesh, implementation: str | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """Builds the jitted step. It donates its state, and its randomness comes from (seed, step) alone.

    A step that the guard skips leaves parameters and optimizer as they were; the schedule counts steps taken.

    Args:
      config: of the run.
      mesh: where it runs.
      implementation: of `kernels.experts`; None: the platform's best.

    Returns:
      (state, batch) → (state, metrics). Metrics are device arrays: scalars, and under `routing` one value
      a mixture layer; see `routing_metrics`. `grad_norm` is of the gradients of what is `trained`, before clipping;
      with LoRA of its targets themselves, not of their factors, which are clipped.
    """
    gradients = make_gradients(config, mesh, implementation)
    optimizer = make_optimizer(config.optimizer, config.train.steps, config.train.seed)
    schedule = learning_rate(config.optimizer, config.train.steps)
    shardings = state_shardings(config, mesh)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = gradients(state.params, batch, state.step)
        part = trained(config.optimizer, state.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, part)
        take, guard = judge(config.train, state.guard, metrics["loss"], metrics["grad_norm"])
        metrics["learning_rate"] = schedule(state.guard.accepted)
        metrics |= {"skipped": guard.skipped, "skipped_in_row": guard.skipped_in_row}
        part = choose(take, optax.apply_updates(part, updates), part)
        params = with_trained(config.optimizer, state.params, part)
        opt_state = choose(take, opt_state, state.opt_state)
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return train_step
