"""The parts of gpu.py that run JAX."""

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpu_inputs import (
    DOCUMENTS,
    INTERPRET,
    Facts,
    Size,
    both_ways,
    choices,
    compiled,
    documents,
    expert_weights,
    learned,
    memory,
    ms,
    normal,
    random_batch,
    run_config,
)
from _timing import versions

from emo_jax.kernels.experts import dispatch, reference, routed_experts
from emo_jax.kernels.experts.gpu_products import best_sizes
from emo_jax.kernels.experts.gpu_rows import pull, push
from emo_jax.kernels.experts.pallas_gpu import routed_experts_gpu
from emo_jax.kernels.experts.slots import assign
from emo_jax.model import bind, draw_pools, flops_per_token, init_parameters, total_parameters
from emo_jax.model.cross_entropy import language_loss
from emo_jax.model.routing import route
from emo_jax.parallel import make_mesh, put_rows
from emo_jax.parallel.chips import peak_flops
from emo_jax.training.optimizer import make_optimizer
from emo_jax.training.step import init_state, make_train_step

DEVICE = jax.devices()[0]
PEAK = peak_flops(DEVICE.device_kind)
OURS = "blocked" if INTERPRET else "pallas_gpu"
"""Routed experts in whole layers and steps; interpreted kernels would take too long there."""
CUTS = [
    {},
    {"stages": 4},
    {"depth": 32, "stages": 4},
    {"hidden": 64, "width": 128},
    {"rows": 64, "hidden": 64, "width": 128, "warps": 4},
    {"rows": 256, "hidden": 64, "width": 128},
]
"""Of our products, other than the default."""
FUSION = "xla_gpu_experimental_use_ragged_dot_fusion"
"""XLA's flag for cuDNN's grouped product, forward from cuDNN 9.22 on."""
TRITON = "jax_ragged_dot_use_gpu_pallas_triton_lowering"
"""JAX's flag, up to 0.11, for a kernel in a module that its wheels lack."""
MOST_REPEATED_GB = 60


# 1 to 3: kernels


def kernels(size: Size, report: Any, args: argparse.Namespace) -> None:
    """Copy bandwidth, rows to slots and back, routed experts; our kernels against the reference first."""
    report("0 all", versions(), interpreted=INTERPRET)
    report.attempt("0 check", "largest relative error, bfloat16", functools.partial(agree, "bfloat16"))
    x = normal(0, size["copied"])
    copy_gbs = 2 * x.nbytes / 1e6 / ms(jax.jit(jnp.negative), x, calls=5)
    report("1 copy", f"{x.nbytes / 1e9:.2f} GB there and back", gb_s=copy_gbs)
    del x
    for rows in size["rows"]:
        move_rows(size, rows, copy_gbs, report)

    weights = expert_weights(size["E"] - 1, size["D"], size["F"])
    default = best_sizes(size["D"], size["F"], jnp.bfloat16)
    assert default
    for i, cut in enumerate(CUTS[:1] if args.smoke else CUTS):
        for rows in size["rows"] if i == 0 else size["rows"][:1]:
            ours = functools.partial(routed_experts_gpu, sizes=default._replace(**cut), interpret=INTERPRET)
            label = f"{rows * size['S']} tokens: ours {', '.join(f'{k}={v}' for k, v in cut.items())}"
            run = functools.partial(time_experts, size, rows, weights, ours, forward=i == 0)
            report.attempt("3 experts", label, run)
    flags: list[tuple[str, Facts]] = [("ragged", {}), ("ragged", {FUSION: True}), ("ragged", {TRITON: True})]
    if importlib.util.find_spec("tokamax"):
        flags.insert(0, ("tokamax", {}))
    for name, options in flags:
        by_name(size, weights, name, options, report)
    report.attempt("0 check", "largest relative error, float32", functools.partial(agree, "float32"))


def blocked(size: Size, report: Any, args: argparse.Namespace) -> None:
    """Part 3 by the formulation for CPU: on its own, since at some sizes XLA's GPU compiler takes minutes for it."""
    by_name(size, expert_weights(size["E"] - 1, size["D"], size["F"]), "blocked", {}, report)


def by_name(size: Size, weights: tuple, name: str, options: Facts, report: Any) -> None:
    """Part 3, by an implementation that `routed_experts` offers, and flags; fewer tokens first."""
    for rows in sorted(size["rows"]):
        label = f"{rows * size['S']} tokens: {' '.join([name, *options])}"
        if options and INTERPRET:
            report("3 experts", label, skipped="a GPU's flag")
        else:
            report.attempt("3 experts", label, functools.partial(others, size, rows, weights, name, options))


def agree(dtype: str) -> Facts:
    """The largest errors of our kernels, relative to the largest value, of results and gradients."""
    found, rng = {}, np.random.default_rng(0)
    tokens, taken, experts, d, f = (70, 2, 3, 64, 64) if INTERPRET else (1000, 3, 8, 512, 256)
    weights = expert_weights(experts, d, f, dtype)
    x, cotangent = normal(3, tokens, d, dtype=dtype), normal(4, tokens, d, dtype=dtype)
    weight_TC = jnp.asarray(rng.random((tokens, taken)), jnp.float32)

    def gradients(compute: Callable[..., Any], indices: jax.Array, *arrays: jax.Array) -> Any:
        def run(x, w, *weights):
            return compute(x, indices, w, *weights)

        return both_ways(run)(arrays[:-1], (), arrays[-1])

    ours, exact = (
        jax.jit(functools.partial(gradients, compute))
        for compute in (functools.partial(routed_experts_gpu, interpret=INTERPRET), reference)
    )
    for pattern in ("uniform", "one takes all"):
        likes = rng.random((tokens, experts)) + (np.arange(experts) == 1) * 9 * (pattern != "uniform")
        indices = np.argsort(-likes, 1)[:, :taken].astype(np.int32)
        indices[rng.random(tokens) < 0.2] = experts  # no expert
        arrays = (x, weight_TC, *weights, cotangent)
        with jax.default_matmul_precision("highest"):  # not ours, which would compile 3.5 times as long
            want = exact(indices, *(a.astype(jnp.float32) for a in arrays))
        pairs = zip(jax.tree.leaves(ours(indices, *arrays)), jax.tree.leaves(want), strict=True)
        errors = [jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max() for a, b in pairs]
        found[pattern] = float(jnp.stack(errors).max())  # NaN, if any is
    return found


def move_rows(size: Size, rows: int, copy_gbs: float, report: Any) -> None:
    """Part 2, at B rows of tokens."""
    tokens, d, experts = rows * size["S"], size["D"], size["E"] - 1
    sizes = best_sizes(d, size["F"], jnp.bfloat16)
    assert sizes
    indices_TC, weights_TC = choices(tuple(size.items()), rows)
    count = functools.partial(assign, experts=experts, rows=sizes.rows)
    sort = functools.partial(dispatch.plan, experts=experts, block=1)
    slots, plan = jax.jit(count)(indices_TC), jax.jit(sort)(indices_TC)
    number, filled = len(slots.tiles.expert_N) * sizes.rows, int((indices_TC < experts).sum())
    load_R = jnp.bincount(indices_TC.reshape(-1), length=experts + 1)[:experts]
    report("2 rows", f"{tokens} tokens", choices=filled, load_max_over_mean=float(load_R.max() / load_R.mean()))
    x_TD, y_MD = normal(1, tokens, d), normal(2, number, d)
    pushed = functools.partial(push, slots=number, interpret=INTERPRET)
    pulled = functools.partial(pull, tokens=tokens, interpret=INTERPRET)
    moves: dict[str, tuple[Callable[..., Any], tuple]] = {
        "push, ours": (pushed, (x_TD, weights_TC, slots.slot_CT)),
        "dispatch, XLA's gather": (dispatch.dispatch, (x_TD, plan)),
        "pull, ours": (pulled, (y_MD, None, slots.slot_CT)),
        "combine, XLA's gathers": (dispatch.combine, (y_MD[: plan.choice_M.size], plan)),
        "slots, by counting": (count, (indices_TC,)),
        "plan, by sorting": (sort, (indices_TC,)),
    }

    def move(fn: Callable[..., Any], given: tuple, moving: bool) -> Facts:
        took = ms(jax.jit(fn), *given, calls=20)
        rate = (tokens + filled) * d * 2 / 1e6 / took
        gather = {"gb_s": rate, "of_copy": rate / copy_gbs, "as_gather_gb_s": 2 * filled * d * 2 / 1e6 / took}
        return {"ms": took} | (gather if moving else {})

    for label, (fn, given) in moves.items():
        run = functools.partial(move, fn, given, not label.startswith(("slots", "plan")))
        report.attempt("2 rows", f"{tokens} tokens: {label}", run)


def time_experts(
    size: Size, rows: int, weights: tuple, compute: Callable[..., Any], forward: bool = True, **options: Any
) -> Facts:
    """Part 3: forward alone, if so, and with backward."""
    indices_TC, weights_TC = choices(tuple(size.items()), rows)
    x_TD, g_TD = (normal(seed, len(indices_TC), size["D"]) for seed in (3, 4))

    def run(x, w, gate, up, down, indices):
        return compute(x, indices, w, gate, up, down)

    given, other = (x_TD, weights_TC, *weights), (indices_TC,)
    found = {}
    if forward:
        program, _ = compiled(run, *given, *other, **options)
        found["forward_ms"] = ms(program, *given, *other, calls=3)
    program, facts = compiled(both_ways(run), given, other, g_TD, **options)
    both = ms(program, given, other, g_TD, calls=3)
    rate = 18 * int((indices_TC < size["E"] - 1).sum()) * size["D"] * size["F"] / both * 1e3
    peak = {"of_peak": rate / PEAK} if PEAK else {}
    return found | {"both_ms": both, "tflop_s": rate / 1e12} | peak | facts


def others(size: Size, rows: int, weights: tuple, name: str, options: Facts) -> Facts:
    """Part 3, by an implementation that `routed_experts` offers, and flags."""
    repeated_gb = (size["E"] - 1) * rows * size["S"] * (size["K"] - 1) * size["D"] * 2 / 1e9
    if name == "ragged" and not options and repeated_gb > MOST_REPEATED_GB:
        raise MemoryError(f"XLA repeats all rows for each expert: {repeated_gb:.0f} GB")
    compute = functools.partial(routed_experts, implementation=name)
    if TRITON not in options:
        return time_experts(size, rows, weights, compute, **options)
    jax.config.update(TRITON, True)
    try:
        return time_experts(size, rows, weights, compute)
    finally:
        jax.config.update(TRITON, False)


# 4: a layer


def layer(size: Size, report: Any, args: argparse.Namespace) -> None:
    """Pool routing, and what else a step is made of: each forward and backward, as a function of its own."""
    rows = size["rows"][0]
    config = run_config(size, 1, rows, "full")
    params = init_parameters(config.model, 0)
    own, rest = params["layers"]["00"], params | {"layers": {}}
    logits_BSR, ids_BS, pool, draw = learned(size, rows)
    positions_BS = jnp.asarray(documents(rows, size["S"])[1])
    draws = draw_pools(pool, 0, jnp.int32(0), rows=rows, layers=1, documents=DOCUMENTS, experts=size["E"] - 1)
    batch = random_batch(size, rows)
    x_BSD = normal(0, rows, size["S"], size["D"])
    indices_TC, weights_TC = choices(tuple(size.items()), rows)

    def block(own: Any, rest: Any) -> Any:
        return bind(config.model, rest | {"layers": {"00": own}}).layers["00"]

    def whole(own, x, rest, ids, positions, draws):
        options = {"pool": pool, "draws": draws, "documents": DOCUMENTS, "implementation": OURS}
        y, routing, _ = block(own, rest)(x, ids, positions, **options)
        return y, routing.totals.weights_BR, routing.totals.z_B

    def routed(logits, ids, draw):
        routing = route(logits, ids, choices=size["K"] - 1, pool=pool, documents=DOCUMENTS, **draw)
        return routing.weights_BSC, routing.totals.weights_BR, routing.totals.z_B

    def experts(routed, x, w, indices):
        arrays = (routed[name].astype(x.dtype) for name in ("gate", "up", "down"))
        return routed_experts(x.reshape(-1, x.shape[-1]), indices, w, *arrays, implementation=OURS)

    def attention(own, x, rest, ids, positions):
        return block(own, rest).attend(x, ids, positions)[:2]

    def loss(x, head, targets, mask):
        return language_loss(x, head, targets, mask, 1e-5).total

    parts: dict[str, tuple[Callable[..., Any], tuple, tuple]] = {
        "all of it": (whole, (own, x_BSD), (rest, ids_BS, positions_BS, draws)),
        "pool routing": (routed, (logits_BSR,), (ids_BS, draw)),
        "router logits": (lambda own, x, rest: block(own, rest).moe.router_logits(x), (own, x_BSD), (rest,)),
        "attention, with norms": (attention, (own, x_BSD), (rest, ids_BS, positions_BS)),
        "routed experts": (experts, (own["moe"]["routed"], x_BSD, weights_TC), (indices_TC,)),
        "shared expert": (lambda own, x, rest: block(own, rest).moe.shared(x), (own, x_BSD), (rest,)),
        "loss": (loss, (x_BSD, params["head"]), (batch["targets"], batch["loss_mask"])),
    }

    took: list[float] = []

    def measure(fn: Callable[..., Any], given: tuple, others: tuple) -> Facts:
        results = jax.eval_shape(lambda given, others: fn(*given, *others), given, others)
        cotangents = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), results)
        program, facts = compiled(both_ways(fn), given, others, cotangents)
        took.append(ms(program, given, others, cotangents, calls=3))
        share = {"of_layer": took[-1] / took[0]} if measured_whole else {}
        return {"ms": took[-1]} | share | facts

    measured_whole = False
    for label, part in parts.items():
        report.attempt("4 layer", f"{rows} rows: {label}", functools.partial(measure, *part))
        measured_whole = measured_whole or (label == "all of it" and bool(took))
    report.attempt("4 layer", "optimizer, with clipping", lambda: time_optimizer(config, params))


def time_optimizer(config: Any, params: Any) -> Facts:
    """AdamW's update of float32 parameters by bfloat16 gradients, as whole steps compile it."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(lambda a: a.astype(jnp.float32), grads), state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    current = (params, jax.jit(optimizer.init)(params))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        current = jax.block_until_ready(apply(*current, grads))
        times.append(1e3 * (time.perf_counter() - start))
    billions = sum(leaf.size for leaf in jax.tree.leaves(grads)) / 1e9
    took = statistics.median(times[2:])
    return {"ms": took, "ms_a_billion": took / billions}


# 5: whole steps


def train(size: Size, report: Any, args: argparse.Namespace) -> None:
    """Steps of as many layers as fit, with the router's own choices."""
    one, two = (total_parameters(run_config(size, n, 1, "full").model) for n in (1, 2))
    layers = args.layers or 2
    if not args.layers and not args.smoke:
        # As compiled, 14 bytes a parameter (float32, moments, bfloat16 gradients), and what 8 rows take without remat.
        layers = int(((memory() - 30e9) / 15 - (2 * one - two)) / (two - one))
        layers = max(1, min(layers, 16))
    model = run_config(size, layers, 1, "full").model
    flops, billions = flops_per_token(model, size["S"]), total_parameters(model) / 1e9
    report("5 train", "geometry", layers=layers, parameters_b=billions, flops_per_token=flops, peak=PEAK)
    if INTERPRET:
        report("5 train", "ours", skipped="no GPU; blocked instead")
    state: Any = None

    def steps(rows: int, remat: str) -> Facts:
        nonlocal state
        config = run_config(size, layers, rows, remat)
        mesh = make_mesh(config.mesh, rows, [DEVICE])
        if state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            state = None
            state = init_state(config, mesh)
        batch, step, times = put_rows(random_batch(size, rows), mesh), make_train_step(config, mesh, OURS), []
        for _ in range(4 if args.smoke else 10):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[2:])
        rate = rows * size["S"] / seconds
        facts = {"step_ms": 1e3 * seconds, "tokens_s": rate} | ({"mfu": rate * flops / PEAK} if PEAK else {})
        facts |= {"first_s": times[0], "peak_gb": (DEVICE.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9}
        facts["load_max_over_mean"] = float(metrics["routing"]["load_max_over_mean"].mean())
        return facts | {"loss": float(metrics["loss"])}

    settings = [(2, "full"), (2, "none")] if args.smoke else [(8, "none"), (16, "full"), (8, "full"), (4, "none")]
    for rows, remat in settings:
        report.attempt("5 train", f"{rows} rows, remat {remat}, {OURS}", functools.partial(steps, rows, remat))
