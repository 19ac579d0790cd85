"""The step's loss from its sums, against NumPy: what means are over, scopes of balance, statistics.

Letters: B rows, R routed experts, L mixture layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.config import BalanceConfig, Config, ModelConfig, TrainConfig
from emo_jax.model import LanguageLoss, RoutingTotals
from emo_jax.training.loss import Counted, Sums, Tokens, add_to_buffers, combine, routing_metrics

B, R, L, C = 8, 5, 2, 2
SEEDS = st.integers(0, 2**32 - 1)


def config(**balance) -> Config:
    return Config(
        model=ModelConfig(num_layers=L, num_experts=R + 1, num_shared_experts=1, top_k=C + 1),
        balance=BalanceConfig(**{"weight": 0.3, "router_z_weight": 0.2} | balance),
        train=TrainConfig(logits_z_weight=0.05),
    )


def random_routing(rng, tokens_B) -> RoutingTotals:
    """Totals that could have come of rows with so many routed tokens."""
    counts_BR = np.zeros((B, R))
    for b, tokens in enumerate(tokens_B):
        for _ in range(tokens):
            counts_BR[b, rng.permutation(R)[:C]] += 1
    weights_BR = rng.dirichlet(np.ones(R), B) * tokens_B[:, None]
    others = {name: rng.random(B) for name in RoutingTotals._fields[4:]}
    return RoutingTotals(tokens_B.astype(float), rng.integers(1, 3, B).astype(float), counts_BR, weights_BR, **others)


def random_sums(seed) -> Sums:
    rng = np.random.default_rng(seed)
    tokens_B = rng.integers(0, 10, B) * rng.integers(0, 2, B)  # some rows have none
    tokens_B[0] += 1
    routing = tuple(random_routing(rng, tokens_B) for _ in range(L))
    return jax.tree.map(jnp.asarray, Sums(language(rng.random() * 90, rng.random() * 500), routing, ()))


def language(cross_entropy: float, logits_z: float) -> LanguageLoss:
    return LanguageLoss(cross_entropy + 0.05 * logits_z, cross_entropy, logits_z)


def rows(sums: Sums, part: slice) -> Sums:
    """A microbatch: some rows; its share of the scalar sums does not matter here and is 0."""
    return Sums(LanguageLoss(*jnp.zeros(3)), jax.tree.map(lambda x: x[part], sums.routing), ())


def balance(counts_BR, weights_BR, tokens_B):
    """(R / C) Σ f p̄ of one scope."""
    tokens = tokens_B.sum()
    if tokens == 0:
        return 0.0
    return R / C * ((counts_BR.sum(0) / tokens) * (weights_BR.sum(0) / tokens)).sum()


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def test_a_loss_is_its_parts_each_over_its_own_tokens_with_weights_shared_by_layers():
    sums = random_sums(0)
    routed = sums.routing[0].tokens_B.sum()
    loss, parts = combine(config(), sums, Tokens(jnp.int32(7), routed))
    np.testing.assert_allclose(parts["cross_entropy"], sums.language.cross_entropy / 7)
    np.testing.assert_allclose(parts["logits_z"], sums.language.logits_z / 7)
    wanted = [balance(*(np.asarray(x) for x in (t.counts_BR, t.weights_BR, t.tokens_B))) for t in sums.routing]
    np.testing.assert_allclose(parts["balance"], wanted)
    np.testing.assert_allclose(parts["router_z"], [t.z_B.sum() / routed for t in sums.routing])
    wanted = parts["cross_entropy"] + 0.05 * parts["logits_z"]
    wanted += 0.3 / L * parts["balance"].sum() + 0.2 / L * parts["router_z"].sum()
    np.testing.assert_allclose(loss, wanted)


def test_experts_that_every_token_uses_are_left_out_of_the_balance():
    run, sums = config(), random_sums(1)
    run.model = dataclasses.replace(run.model, always_active_experts=("3", "0"))
    _, parts = combine(run, sums, Tokens(jnp.int32(1), sums.routing[0].tokens_B.sum()))
    for ours, always, totals in zip(parts["balance"], (3, 0), sums.routing, strict=True):
        counts_R, weights_R = (np.delete(np.asarray(x).sum(0), always) for x in (totals.counts_BR, totals.weights_BR))
        tokens = float(totals.tokens_B.sum())
        wanted = (R - 1) / (C - 1) * ((counts_R / tokens) * (weights_R / tokens)).sum()
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)


def test_a_dense_model_has_no_router_losses():
    loss, parts = combine(config(), Sums(language(10.0, 40.0), (), ()), Tokens(jnp.int32(5), jnp.int32(5)))
    assert set(parts) == {"cross_entropy", "logits_z"}
    np.testing.assert_allclose(loss, 2 + 0.05 * 8)


def test_a_step_without_tokens_has_a_loss_of_0():
    zeros = jax.tree.map(jnp.zeros_like, random_sums(0))
    for scope in ("global", "local"):
        loss, parts = combine(config(scope=scope), zeros, Tokens(jnp.int32(0), jnp.int32(0)))
        assert loss == 0
        assert all((part == 0).all() for part in jax.tree.leaves(parts))


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.sampled_from([1, 2, 4, 8]))
def test_local_balance_averages_groups_of_rows_by_their_tokens(seed, local_rows):
    sums = random_sums(seed)
    tokens = Tokens(jnp.int32(1), sums.routing[0].tokens_B.sum())
    _, parts = combine(config(scope="local", local_rows=local_rows), sums, tokens)
    for ours, totals in zip(parts["balance"], sums.routing, strict=True):
        counts, weights, tokens_B = (np.asarray(x) for x in (totals.counts_BR, totals.weights_BR, totals.tokens_B))
        wanted = 0.0
        for start in range(0, B, local_rows):
            part = slice(start, start + local_rows)
            wanted += balance(counts[part], weights[part], tokens_B[part]) * tokens_B[part].sum() / tokens_B.sum()
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_local_and_z_losses_of_microbatches_add_up_to_the_step_s(seed):
    sums = random_sums(seed)
    tokens = Tokens(jnp.int32(1), sums.routing[0].tokens_B.sum())
    settings = config(scope="local", local_rows=2)
    _, whole = combine(settings, sums, tokens)
    parts = [combine(settings, rows(sums, slice(i, i + 4)), tokens)[1] for i in (0, 4)]
    for name in ("balance", "router_z"):
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-12)


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_buffers_hold_the_step_so_far_as_in_algorithm_1(seed):
    """Each microbatch pairs its own probabilities with the counts of all so far, itself included."""
    sums = random_sums(seed)
    step_tokens = sums.routing[0].tokens_B.sum()
    buffers = tuple(Counted(jnp.zeros(R), jnp.zeros(())) for _ in range(L))
    seen_LR, seen = np.zeros((L, R)), 0.0
    for i in range(0, B, 2):
        part = rows(sums, slice(i, i + 2))
        buffers = add_to_buffers(buffers, part.routing)
        _, parts = combine(config(scope="buffer"), part, Tokens(jnp.int32(1), step_tokens), buffers)
        seen += float(part.routing[0].tokens_B.sum())
        for layer, totals in enumerate(part.routing):
            seen_LR[layer] += np.asarray(totals.counts_BR).sum(0)
            weights_R = np.asarray(totals.weights_BR).sum(0)
            # p̄ over the microbatch, then weighed by its share of the step's tokens: its tokens cancel.
            wanted = R / C * (seen_LR[layer] / max(seen, 1) * weights_R / step_tokens).sum()
            np.testing.assert_allclose(parts["balance"][layer], wanted, rtol=1e-12, atol=1e-15)


def test_the_first_microbatch_s_buffer_loss_is_the_exact_one():
    sums = random_sums(3)
    tokens = Tokens(jnp.int32(1), sums.routing[0].tokens_B.sum())
    buffers = add_to_buffers(tuple(Counted(jnp.zeros(R), jnp.zeros(())) for _ in range(L)), sums.routing)
    _, buffered = combine(config(scope="buffer"), sums, tokens, buffers)
    _, exact = combine(config(scope="global"), sums, tokens)
    np.testing.assert_allclose(buffered["balance"], exact["balance"], rtol=1e-12)


def test_the_balance_gradient_reaches_probabilities_and_not_counts():
    sums = random_sums(1)
    tokens = Tokens(jnp.int32(1), sums.routing[0].tokens_B.sum())
    grads = jax.grad(lambda sums: combine(config(), sums, tokens)[0])(sums)
    for totals, moved in zip(sums.routing, grads.routing, strict=True):
        np.testing.assert_array_equal(moved.counts_BR, 0)
        f_R = np.asarray(totals.counts_BR).sum(0) / float(tokens.routed)
        wanted_R = 0.3 / L * R / C * f_R / float(tokens.routed)
        np.testing.assert_allclose(moved.weights_BR, np.broadcast_to(wanted_R, (B, R)), rtol=1e-12)
        np.testing.assert_allclose(moved.z_B, 0.2 / L / float(tokens.routed), rtol=1e-12)


def test_statistics_are_means_over_tokens_or_documents_and_extremes_over_rows():
    sums = random_sums(2)
    metrics = routing_metrics(sums.routing)
    for layer, totals in enumerate(sums.routing):
        t = jax.tree.map(np.asarray, totals)
        counts_R, tokens, documents = t.counts_BR.sum(0), t.tokens_B.sum(), t.documents_B.sum()
        wanted = {
            "load_max_over_mean": counts_R.max() / counts_R.mean(),
            "dead_experts": (counts_R == 0).sum(),
            "token_entropy": t.token_entropy_B.sum() / tokens,
            "document_entropy": t.document_entropy_B.sum() / documents,
            "pool_mass": t.pool_mass_B.sum() / tokens,
            "experts_per_document": t.unique_B.sum() / documents,
            "pool_size_mean": t.pool_size_B.sum() / documents,
            "pool_size_min": t.pool_min_B.min(),
            "pool_size_max": t.pool_max_B.max(),
        }
        assert set(metrics) == {*wanted, "expert_load"}
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name][layer], value, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(metrics["expert_load"][layer], counts_R / counts_R.mean(), rtol=1e-12)


def test_statistics_of_a_step_without_tokens_are_finite():
    zeros = jax.tree.map(jnp.zeros_like, random_sums(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(routing_metrics(zeros.routing)))
