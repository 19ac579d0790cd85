"""Clusters of router probabilities: against NumPy, and on points whose clusters are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from emo_jax.analysis import clusters as clusters_module
from emo_jax.analysis.clusters import cluster
from emo_jax.errors import UserError


def softmax(logits):
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (values / values.sum(axis=1, keepdims=True)).astype(np.float16)


def planted(points: int, groups: int, layers: int = 2, experts: int = 12, noise: float = 0.5, seed: int = 0):
    """Probabilities of layers whose routers follow a hidden group, and the groups, the first the largest."""
    rng = np.random.default_rng(seed)
    share = np.arange(groups, 0, -1) ** 1.5
    group_N = rng.choice(groups, points, p=share / share.sum())
    return [
        softmax(2.5 * rng.normal(size=(groups, experts))[group_N] + noise * rng.normal(size=(points, experts)))
        for _ in range(layers)
    ], group_N


def test_planted_clusters_are_found_and_numbered_by_size():
    parts, group_N = planted(2000, 6, layers=4, noise=0.3)
    found = cluster(parts, 6, 0)
    assert adjusted_rand_score(group_N, found.label_N) > 0.99
    assert found.label_N.dtype == np.int32 and found.closeness_N.dtype == np.float32
    np.testing.assert_array_equal(found.size_K, np.bincount(found.label_N, minlength=6))
    assert (np.diff(found.size_K) <= 0).all() and found.size_K.sum() == 2000


def test_points_become_the_directions_that_a_singular_value_decomposition_gives(monkeypatch):
    monkeypatch.setattr(clusters_module, "_BLOCK", 64)  # several blocks, the last not full
    parts, _ = planted(300, 4, noise=1.0)
    unit_NP, variance = clusters_module._directions(parts)
    whole = np.concatenate(parts, axis=1).astype(np.float64)
    whole -= whole.mean(axis=0)
    left, values, _ = np.linalg.svd(whole, full_matrices=False)
    share = np.cumsum(values**2) / (values**2).sum()
    kept = int((share < 0.95).sum()) + 1
    assert unit_NP.shape == (300, kept) and variance == pytest.approx(share[kept - 1], abs=1e-6)
    scores = left[:, :kept] * values[:kept]
    wanted = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs((unit_NP * wanted).sum(axis=0)), (wanted**2).sum(axis=0), rtol=1e-3)  # up to sign
    np.testing.assert_allclose(unit_NP @ unit_NP.T, wanted @ wanted.T, atol=1e-4)


def test_each_point_is_closest_to_its_own_cluster_mean():
    parts, _ = planted(1500, 5, noise=1.5)
    found = cluster(parts, 8, 3)
    unit_NP, _ = clusters_module._directions(parts)
    centre_KP = np.array([unit_NP[found.label_N == k].sum(axis=0) for k in range(8)])
    centre_KP /= np.linalg.norm(centre_KP, axis=1, keepdims=True)
    cosine_NK = unit_NP @ centre_KP.T
    np.testing.assert_array_equal(cosine_NK.argmax(axis=1), found.label_N)
    np.testing.assert_allclose(found.closeness_N, cosine_NK.max(axis=1), atol=1e-5)


def test_results_depend_on_the_seed_alone_and_not_on_threads():
    parts, _ = planted(5000, 5, experts=40, noise=1.5)
    first = cluster(parts, 16, 7)
    for threads in (1, 3):
        with threadpool_limits(threads):
            again = cluster(parts, 16, 7)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(cluster(parts, 16, 8).label_N, first.label_N)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_any_number_of_clusters_up_to_that_of_different_points_works(points, clusters, seed, repeated):
    parts, _ = planted(points, 3, layers=1, experts=6, noise=1.0, seed=seed)
    if repeated:
        parts = [np.concatenate([part, part]) for part in parts]
    rows = np.round(clusters_module._directions(parts)[0], 3) + 0.0
    different = len(np.unique(rows, axis=0))  # fewer than points, where PCA leaves a line
    if clusters > different:
        with pytest.raises(UserError, match=f"{clusters} clusters cannot be made of"):
            cluster(parts, clusters, seed)
    found = cluster(parts, clusters, seed, fewer=True)
    assert len(found.size_K) == min(clusters, different) and (found.size_K > 0).all()
    if repeated:  # equal points are in one cluster, wherever they stand
        half = len(found.label_N) // 2
        same = found.label_N[:half] == found.label_N[half:]
        assert same.all()


def test_equal_points_are_one_and_an_empty_cluster_begins_anew(monkeypatch):
    parts, _ = planted(40, 3)
    equal = [np.repeat(part[:1], 50, axis=0) for part in parts]
    with pytest.raises(UserError, match="3 clusters cannot be made of 50 points of which 1 differ"):
        cluster(equal, 3, 0)
    assert cluster(equal, 3, 0, fewer=True).size_K.tolist() == [50]

    class AllAtOnePlace:
        def __init__(self, clusters, **_):
            self.clusters = clusters

        def fit(self, unit_NP):
            self.cluster_centers_ = np.repeat(unit_NP[:1], self.clusters, axis=0)
            return self

    monkeypatch.setattr("sklearn.cluster.MiniBatchKMeans", AllAtOnePlace)
    parts, group_N = planted(600, 4, noise=0.2)
    found = cluster(parts, 4, 0)
    assert (found.size_K > 0).all() and adjusted_rand_score(group_N, found.label_N) > 0.4
