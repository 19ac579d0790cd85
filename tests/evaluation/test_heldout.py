"""Held-out loss by domain against the model's own logits, and what must not change it.

Letters: B rows, S sequence, G documents a row, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.evaluation import make_heldout_loss
from emo_jax.model import abstract_parameters, bind
from emo_jax.model.routing import PoolDraws
from tests import oracle
from tests.training import tiny

DOMAINS = ("code", "unread", "prose", "verse")
RUN = tiny.config(model={"num_layers": 1, "experts_per_layer": (8,)}, mesh={"data": -1})


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def heldout_batch(seed: int, rows=tiny.ROWS) -> dict[str, np.ndarray]:
    """Documents of every domain but `unread`; places without a document claim it."""
    batch = tiny.batch(seed, rows)
    domains_BG = np.random.default_rng(seed).choice([0, 2, 3], (len(rows), tiny.G)).astype(np.int32)
    for b, lengths in enumerate(rows):
        domains_BG[b, len(lengths) :] = 1
    return batch | {"document_domains": domains_BG}


@functools.cache
def evaluate(devices=1):
    return make_heldout_loss(RUN.model, tiny.devices_mesh(RUN, devices), DOMAINS)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.5), abstract_parameters(RUN.model))


@pytest.fixture(scope="module")
def logits():
    """Jitted (params, batch, pool size or None) → logits."""

    @functools.partial(jax.jit, static_argnums=2)
    def of(params, batch, size):
        model = bind(RUN.model, params)
        draws = None
        if size:
            shape = (len(batch["tokens"]), 1, tiny.G)
            draws = PoolDraws(jnp.full(shape, size, jnp.int32), jnp.zeros((*shape, 2), jnp.uint32))
        pool = dataclasses.replace(RUN.pool, kind="document" if size else "none")
        inputs = (batch["tokens"], batch["document_ids"], batch["positions"])
        return model.logits(model(*inputs, pool=pool, draws=draws, documents=tiny.G)[0])

    return of


def by_domain(logits_BSV, batch):
    """Sum of losses, number of predicted tokens and of hits among them of each domain, a token at a time."""
    sums = {name: [0.0, 0, 0] for name in DOMAINS}
    for b, s in np.argwhere(batch["loss_mask"]):
        name = DOMAINS[batch["document_domains"][b, batch["document_ids"][b, s] - 1]]
        z_V = np.asarray(logits_BSV[b, s])
        sums[name][0] += oracle.logsumexp(z_V) - z_V[batch["targets"][b, s]]
        sums[name][1] += 1
        sums[name][2] += z_V.argmax() == batch["targets"][b, s]
    return sums


def test_losses_are_the_means_of_each_domain_over_all_batches(params, logits):
    batches = [heldout_batch(seed) for seed in (0, 1)]
    found = evaluate()(params, batches)
    parts = [by_domain(logits(params, batch, None), batch) for batch in batches]
    total = np.sum([[part[name] for name in DOMAINS] for part in parts], axis=0)
    assert set(found.domains) == {"code", "prose", "verse"}
    assert total[:, 2].sum() > 0
    for name, (loss, tokens, hits) in zip(DOMAINS, total, strict=True):
        if tokens:
            assert found.domains[name].tokens == tokens
            np.testing.assert_allclose(found.domains[name].loss, loss / tokens, rtol=1e-10)
            np.testing.assert_allclose(found.domains[name].accuracy, hits / tokens, rtol=1e-10)
    assert found.all.tokens == total[:, 1].sum() == 2 * tiny.batch()["loss_mask"].sum()
    np.testing.assert_allclose(found.all.loss, total[:, 0].sum() / total[:, 1].sum(), rtol=1e-10)
    np.testing.assert_allclose(found.all.accuracy, total[:, 2].sum() / total[:, 1].sum(), rtol=1e-10)


def test_a_document_pool_would_change_the_loss_and_is_not_used(params, logits):
    """Held-out losses are likelihoods: those of the same weights as a standard mixture, which has no pool."""
    batch = heldout_batch(0)
    free, pooled = (by_domain(logits(params, batch, size), batch) for size in (None, 2))
    found = evaluate()(params, [batch]).domains["code"].loss
    np.testing.assert_allclose(found, free["code"][0] / free["code"][1], rtol=1e-10)
    assert abs(pooled["code"][0] - free["code"][0]) > 1e-3 * free["code"][1]


def test_padding_and_rows_of_padding_change_nothing(params):
    batch, other = heldout_batch(0), heldout_batch(0)
    padding_BS = batch["document_ids"] == 0
    assert padding_BS.all(1).any()
    for name, value in {"tokens": 3, "targets": 5, "positions": 7}.items():
        other[name][padding_BS] = value
    ours, wanted = evaluate()(params, [other]), evaluate()(params, [batch])
    assert ours == wanted
    np.testing.assert_equal(ours.choices, wanted.choices)


def test_choices_are_those_of_each_documents_tokens(params):
    batches = [heldout_batch(seed) for seed in (0, 1)]
    found = evaluate()(params, batches).choices
    domain_M, count_MR = [], []
    for batch in batches:
        model = bind(RUN.model, params)
        (routing,) = model(batch["tokens"], batch["document_ids"], batch["positions"], documents=tiny.G)[1]
        for b, g in np.ndindex(batch["document_domains"].shape):
            inside_S = batch["document_ids"][b] == g + 1
            if inside_S.any():
                domain_M.append(batch["document_domains"][b, g])
                count_MR.append(np.bincount(routing.indices_BSC[b, inside_S].ravel(), minlength=7))
    np.testing.assert_array_equal(found.domain_M, domain_M)
    np.testing.assert_array_equal(found.count_LMR, [count_MR])
    assert 1 not in found.domain_M, "places without a document claim it"


def test_four_devices_find_the_same_losses(params):
    ours, wanted = (evaluate(devices)(params, [heldout_batch(0)]) for devices in (4, 1))
    np.testing.assert_equal(ours.choices, wanted.choices)
    np.testing.assert_allclose(ours.all, wanted.all, rtol=1e-12)
    assert ours.domains.keys() == wanted.domains.keys()
    for name, loss in wanted.domains.items():
        np.testing.assert_allclose(ours.domains[name], loss, rtol=1e-12)


def test_json_has_the_loss_accuracy_and_tokens_of_each_domain(params):
    found = evaluate()(params, [heldout_batch(0)])
    record = found.to_json()
    assert (record["loss"], record["accuracy"], record["tokens"]) == found.all
    assert tuple(record["domains"]["code"].values()) == found.domains["code"]
    assert sum(part["tokens"] for part in record["domains"].values()) == record["tokens"]
