"""What is minimised: cross-entropy, the output z-term, and the router's balance and z losses.

A step's loss is a function of sums over its rows, so it is the same however the rows are split over
microbatches and devices. Letters: B rows, R routed experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.config import Config
from emo_jax.model import LanguageLoss, RoutingTotals, balance_loss, importance_loss


class Sums(NamedTuple):
    """Sums over the rows of a step or a microbatch.

    Attributes:
      language: scalars, over loss tokens.
      routing: one `RoutingTotals` a mixture layer, still a value a row.
      loads: one `Routing.load_NC` a mixture layer.
    """

    language: LanguageLoss
    routing: tuple[RoutingTotals, ...]
    loads: tuple[jax.Array | None, ...]


class Tokens(NamedTuple):
    """What the means of a step are taken over: scalars, counted over all its rows."""

    loss: jax.Array
    routed: jax.Array


class Counted(NamedTuple):
    """A layer's running buffer of choices [R] and of the tokens that made them (balance scope `buffer`)."""

    counts_R: jax.Array
    tokens: jax.Array


def combine(
    config: Config, sums: Sums, tokens: Tokens, buffers: tuple[Counted, ...] | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the rows in `sums`, as their share of a step with so many tokens.

    Args:
      config: weights and scope of the losses.
      sums: of a whole step (balance scope `global` needs that), or of a microbatch: then the result is
        its addend to the step's loss.
      tokens: of the whole step.
      buffers: one a layer in scope `buffer`, the rows in `sums` included; else None.

    Returns:
      The scalar loss and its parts: `cross_entropy`, `logits_z` and, with experts, `balance` and
      `router_z` [L].
    """
    loss_tokens, routed_tokens = (jnp.maximum(count, 1) for count in tokens)
    language = jax.tree.map(lambda total: total / loss_tokens, sums.language)
    loss, parts = language.total, {"cross_entropy": language.cross_entropy, "logits_z": language.logits_z}
    if sums.routing:
        layers = enumerate(zip(sums.routing, buffers or (None,) * len(sums.routing), strict=True))
        parts["balance"] = jnp.stack([_balance(config, *layer, i) for i, layer in layers]) / routed_tokens
        parts["router_z"] = jnp.stack([totals.z_B.sum() for totals in sums.routing]) / routed_tokens
        loss += config.balance.weight * parts["balance"].mean()
        loss += config.balance.router_z_weight * parts["router_z"].mean()
    return loss, parts


def add_to_buffers(buffers: tuple[Counted, ...], routing: tuple[RoutingTotals, ...]) -> tuple[Counted, ...]:
    """The buffers after another microbatch (arXiv 2501.11873, algorithm 1); they restart with every step."""
    return tuple(
        Counted(b.counts_R + t.counts_BR.sum(0), b.tokens + t.tokens_B.sum())
        for b, t in zip(buffers, routing, strict=True)
    )


def _balance(config: Config, totals: RoutingTotals, buffer: Counted | None, layer: int) -> jax.Array:
    """The balance loss of these rows times their routed tokens, over one scope or groups of `local_rows`.

    Experts that every token uses have nothing to balance and are left out of it, as in the public code.
    """
    rows = totals.tokens_B.shape[0]
    group = config.balance.local_rows if config.balance.scope == "local" else rows

    def groups(x: jax.Array) -> jax.Array:
        return x.reshape(rows // group, group, *x.shape[1:]).sum(1)

    counts, weights, tokens = (groups(x) for x in (totals.counts_BR, totals.weights_BR, totals.tokens_B))
    always = config.model.always_active(layer)
    choices = config.model.num_choices - len(always)
    balanced = np.setdiff1d(np.arange(counts.shape[-1]), always)
    counted = counts if buffer is None else buffer.counts_R[None]
    if always:
        counted, weights = counted[:, balanced], weights[:, balanced]
    if config.balance.kind == "importance":
        losses = importance_loss(weights)
    else:
        losses = balance_loss(counted, weights, tokens, choices, None if buffer is None else buffer.tokens[None])
    return (losses * tokens).sum()


def routing_metrics(routing: tuple[RoutingTotals, ...]) -> dict[str, Any]:
    """What people watch, each [L]; `expert_load` a list of [R], tokens relative to the mean expert's.

    Means are over the step's routed tokens or documents; entropies are of the unmasked softmax, in nats.
    """
    metrics: dict[str, list[jax.Array]] = {}

    def add(name: str, value: jax.Array) -> None:
        metrics.setdefault(name, []).append(value)

    loads = []
    for totals in routing:
        counts_R = totals.counts_BR.sum(0)
        tokens, documents = jnp.maximum(totals.tokens_B.sum(), 1), jnp.maximum(totals.documents_B.sum(), 1)
        loads.append(counts_R / jnp.maximum(counts_R.mean(), 1e-9))
        add("load_max_over_mean", loads[-1].max())
        add("dead_experts", (counts_R == 0).sum())
        add("token_entropy", totals.token_entropy_B.sum() / tokens)
        add("document_entropy", totals.document_entropy_B.sum() / documents)
        add("pool_mass", totals.pool_mass_B.sum() / tokens)
        add("experts_per_document", totals.unique_B.sum() / documents)
        add("pool_size_mean", totals.pool_size_B.sum() / documents)
        add("pool_size_min", totals.pool_min_B.min())
        add("pool_size_max", totals.pool_max_B.max())
    return {name: jnp.stack(values) for name, values in metrics.items()} | {"expert_load": loads}
