"""Which tokens are routed alike? Spherical k-means on router probabilities, as in arXiv 2605.06663, figure 5.

Letters: N points (tokens, or documents), R routed experts, L mixture layers, D dimensions (all layers' experts), P of
them left by PCA, K clusters.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from emo_jax.errors import require

VARIANCE = 0.95
"""Share of it that PCA keeps."""
_BLOCK = 4096
_STARTS = 10
_STEPS = 300


class Clusters(NamedTuple):
    """A partition of points.

    Attributes:
      label_N: int32, the cluster of each; clusters are numbered by falling size.
      closeness_N: float32, cosine to the own cluster's centre.
      size_K: int64 points of each.
      variance: share of the variance that PCA kept.
      dimensions: P.
    """

    label_N: np.ndarray
    closeness_N: np.ndarray
    size_K: np.ndarray
    variance: float
    dimensions: int


def cluster(probability_LNR: Sequence[np.ndarray], clusters: int, seed: int, *, fewer: bool = False) -> Clusters:
    """Clusters points by the direction in which their probabilities leave the mean of all.

    All layers' probabilities side by side are centred, reduced by PCA and scaled to length 1. scikit-learn's mini-batch
    k-means gives the start; then each point goes to the centre of the largest cosine, and each centre to the mean
    direction of its points, until nothing changes.

    One thread does it all, so that sums have one order and results do not depend on the machine's number of cores;
    points are widened to float64 a block at a time.

    Args:
      probability_LNR: [N, R] of each layer.
      clusters: K.
      seed: of the start.
      fewer: make do with as many clusters as points differ.

    Raises:
      UserError: where fewer than K points differ.
    """
    from threadpoolctl import threadpool_limits  # here and below, because scikit-learn takes a second to import

    with threadpool_limits(1):
        unit_NP, variance = _directions(probability_LNR)
        different = _count_different(unit_NP, clusters)
        clusters = min(clusters, different) if fewer else clusters
        require(
            1 <= clusters <= different,
            f"{clusters} clusters cannot be made of {len(unit_NP)} points of which {different} differ; ask for fewer "
            "clusters or give more text.",
        )
        return _spherical_k_means(unit_NP, clusters, seed, variance)


def _blocks(probability_LNR: Sequence[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows and their values of all layers side by side, float64 [block, D]."""
    for first in range(0, len(probability_LNR[0]), _BLOCK):
        rows = slice(first, first + _BLOCK)
        yield rows, np.concatenate([part_NR[rows] for part_NR in probability_LNR], axis=1, dtype=np.float64)


def _directions(probability_LNR: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Points after centring and PCA, of length 1 (or 0), float32 [N, P], and the share of variance in them."""
    mean_D = np.concatenate([part_NR.mean(axis=0, dtype=np.float64) for part_NR in probability_LNR])
    covariance_DD = np.zeros((len(mean_D), len(mean_D)))
    for _, block_BD in _blocks(probability_LNR):
        block_BD -= mean_D[None]
        covariance_DD += block_BD.T @ block_BD
    variance_D, axes_DD = np.linalg.eigh(covariance_DD)
    share_D = np.cumsum(variance_D[::-1]) / max(variance_D.sum(), np.finfo(np.float64).tiny)
    dimensions = min(int(np.searchsorted(share_D, VARIANCE)) + 1, len(share_D))
    axes_DP = np.ascontiguousarray(axes_DD[:, ::-1][:, :dimensions], np.float32)
    unit_NP = np.empty((len(probability_LNR[0]), dimensions), np.float32)
    for rows, block_BD in _blocks(probability_LNR):
        projected_BP = (block_BD - mean_D[None]).astype(np.float32) @ axes_DP
        norm_B = np.linalg.norm(projected_BP, axis=1)
        unit_NP[rows] = projected_BP / np.where(norm_B > 1e-9, norm_B, np.inf)[:, None]
    return unit_NP, float(share_D[dimensions - 1])


def _count_different(unit_NP: np.ndarray, enough: int) -> int:
    """How many rows differ by more than rounding; counted only as far as `enough`."""
    seen: set[bytes] = set()
    for row_P in unit_NP:
        seen.add((np.round(row_P, 3) + 0.0).tobytes())  # −0 becomes 0
        if len(seen) >= enough:
            break
    return len(seen)


def _spherical_k_means(unit_NP: np.ndarray, clusters: int, seed: int, variance: float) -> Clusters:
    from sklearn.cluster import MiniBatchKMeans

    start = MiniBatchKMeans(clusters, n_init=_STARTS, batch_size=_BLOCK, max_iter=_STEPS, random_state=seed)
    centre_KP = start.fit(unit_NP).cluster_centers_
    label_N = np.full(len(unit_NP), -1)
    for _ in range(_STEPS):
        centre_KP /= np.maximum(np.linalg.norm(centre_KP, axis=1, keepdims=True), 1e-9)
        cosine_NK = unit_NP @ centre_KP.T
        before_N, label_N = label_N, cosine_NK.argmax(axis=1)
        closeness_N = cosine_NK[np.arange(len(label_N)), label_N]
        for empty in np.setdiff1d(np.arange(clusters), label_N):
            # It begins anew at the point that fits worst where it is, and is not alone there.
            shared_N = np.bincount(label_N, minlength=clusters)[label_N] > 1
            worst = np.where(shared_N, closeness_N, np.inf).argmin()
            label_N[worst], closeness_N[worst] = empty, 1
        if (label_N == before_N).all():
            break
        sums = [unit_NP[label_N == k].sum(axis=0, dtype=np.float64) for k in range(clusters)]
        centre_KP = np.array(sums, np.float32)
    size_K = np.bincount(label_N, minlength=clusters)
    order_K = np.argsort(-size_K, kind="stable")
    rank_K = np.argsort(order_K)
    return Clusters(
        rank_K[label_N].astype(np.int32),
        closeness_N.astype(np.float32),
        size_K[order_K].astype(np.int64),
        variance,
        unit_NP.shape[1],
    )
