"""Losses under a prompt's pool against the NumPy oracle, and the expert cache against a cache that is simulated."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.errors import UserError
from emo_jax.evaluation.serving import WHOLE, Served, cache_hits, switching
from emo_jax.modularity import Subset, cut, fingerprint, kept_masks
from tests import oracle
from tests.modularity import small

BEHIND = 6


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model():
    config = small.config()
    return config, small.parameters(config)


@pytest.fixture(scope="module")
def served(model):
    return Served(*model, {"a": small.batches(2)}, BEHIND)


def wanted(model, size, prompt):
    """Mean loss, share of hits and number of the tokens behind the sixth of each document."""
    config, params = model
    setting = oracle.Settings.of(config, pool_kind="document" if size else "none")
    losses, hits = [], []
    for batch in small.batches(2):
        rows, documents = batch["tokens"].shape[0], int(batch["document_ids"].max())
        sizes = np.full((2, rows, documents), size or 99)
        voters = {"voters": batch["positions"] < prompt}
        logits_BSV = oracle.forward(params, batch | voters, setting, sizes).logits_BSV
        for b, s in zip(*np.nonzero(batch["loss_mask"] & (batch["positions"] >= BEHIND - 1)), strict=True):
            logits_V, target = logits_BSV[b, s], batch["targets"][b, s]
            losses.append(oracle.logsumexp(logits_V) - logits_V[target])
            hits.append(logits_V.argmax() == target)
    return np.mean(losses), np.mean(hits), len(losses)


@pytest.mark.parametrize(("size", "prompt"), [(0, WHOLE), (4, 1), (4, 5), (3, WHOLE), (99, 3)])
def test_losses_under_a_prompts_pool_are_the_oracles(model, served, size, prompt):
    np.testing.assert_allclose(served.loss("a", size, prompt), wanted(model, size, prompt), rtol=1e-9)


def test_a_subset_is_the_model_that_is_cut_to_it(model, served):
    config, params = model
    subset = Subset(((0, 3, 6), (1, 2, 5, 8)), fingerprint(config, params), "by hand", "")
    masked = served.loss("a", kept=kept_masks(config, subset))
    small_model = Served(*cut(config, params, subset), {"a": small.batches(2)}, BEHIND)
    np.testing.assert_allclose(masked, small_model.loss("a"), rtol=1e-9)
    # A pool within it is chosen as the cut model chooses it.
    np.testing.assert_allclose(
        served.loss("a", 3, 5, kept_masks(config, subset)), small_model.loss("a", 3, 5), rtol=1e-9
    )


def test_choices_are_those_of_each_documents_tokens(model, served):
    found = list(served.choices("a", 4, 5))
    setting = oracle.Settings.of(model[0], pool_kind="document")
    expected = []
    for batch in small.batches(2):
        rows, documents = batch["tokens"].shape[0], int(batch["document_ids"].max())
        voters = {"voters": batch["positions"] < 5}
        routings = oracle.forward(model[1], batch | voters, setting, np.full((2, rows, documents), 4)).routings
        for b, ids_S in enumerate(batch["document_ids"]):
            expected += [
                np.stack([routing.indices_BSC[b, ids_S == g] for routing in routings]) for g in sorted({*ids_S} - {0})
            ]
    assert len(found) == len(expected) > 10
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_hits_are_those_of_a_simulated_cache_of_each_size(seed, experts):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, experts, (2, length, 2)) for length in rng.integers(1, 7, 3)]
    hits_R = cache_hits(documents, experts)
    for size in range(1, experts + 1):
        hits = uses = 0
        caches = [collections.OrderedDict() for _ in range(2)]
        for document_LSC in documents:
            for layer, cache in enumerate(caches):
                for expert in document_LSC[layer].ravel().tolist():
                    uses += 1
                    hits += expert in cache
                    cache[expert] = True
                    cache.move_to_end(expert)
                    if len(cache) > size:
                        cache.popitem(last=False)
        assert hits_R[size - 1] == pytest.approx(hits / uses)
    assert (np.diff(hits_R) >= 0).all()


def test_a_stream_takes_a_document_of_each_domain_in_turn():
    assert switching({"a": [1, 2, 3], "b": [4, 5]}) == [1, 4, 2, 5]


def test_prompts_longer_than_every_document_are_refused(model):
    with pytest.raises(UserError, match="a has no document of more than 12 tokens"):
        Served(*model, {"a": small.batches(1)}, 12)
    with pytest.raises(UserError, match="no documents to simulate"):
        cache_hits([], 3)
