"""How the neurons of a dense feed-forward layer are divided into experts of one size, as EMoE does (arXiv 2310.10908).

Letters: F hidden neurons, D model, N experts, M = F / N neurons of an expert, T tokens, P dimensions of the vectors
that stand for neurons.
"""

import dataclasses

import numpy as np

from emo_jax.errors import UserError, nearest_divisors, require, require_choice

METHODS = ("kmeans", "contiguous", "random", "coactivation")
STARTS = 10
"""Of k-means, the best of which counts: the library's default, with which the paper's code runs."""
_STEPS = 1000
"""Of one start at most, as in the paper's code; it stops long before, after 2 to 34 where measured."""
_SCALE = 1000.0
"""Of the unit vectors given to the library, which rounds distances to 1/1000."""


@dataclasses.dataclass(frozen=True, eq=False)
class Coactivation:
    """How often two neurons fired on the same token; those of several batches are added with `+`.

    Attributes:
      tokens: T.
      joint_FF: int32, tokens on which both neurons fired; on the diagonal those on which the neuron fired at all.
    """

    tokens: int
    joint_FF: np.ndarray

    def __add__(self, other: "Coactivation") -> "Coactivation":
        return Coactivation(self.tokens + other.tokens, self.joint_FF + other.joint_FF)

    def correlation(self) -> np.ndarray:
        """Of firing or not, float64 [F, F]; rows and columns of neurons that always or never fired are 0."""
        count_F = np.diagonal(self.joint_FF).astype(np.float64)
        variance_F = count_F * (self.tokens - count_F)
        correlation_FF = self.joint_FF * np.float64(self.tokens)
        correlation_FF -= np.multiply.outer(count_F, count_F)
        inverse_F = 1 / np.sqrt(np.where(variance_F > 0, variance_F, np.inf))
        correlation_FF *= np.multiply.outer(inverse_F, inverse_F)
        return correlation_FF


def coactivation(hidden_TF: np.ndarray) -> Coactivation:
    """Counts which neurons fire together on a batch's tokens; leave padding out.

    A neuron fires on a token where the input of its activation function is positive. Counts weigh every token alike,
    where sums of activations would follow the few largest, and they are exact: batches may be cut anywhere.

    Args:
      hidden_TF: of the activation function the inputs or, as ReLU, GELU and SiLU keep signs, the outputs. Of a gated
        layer the gate's, not their products with `up`, whose sign says nothing.
    """
    fired_TF = (hidden_TF > 0).astype(np.float32)  # its products are exact up to 2²⁴ tokens
    return Coactivation(len(fired_TF), (fired_TF.T @ fired_TF).astype(np.int32))


def neuron_order(
    method: str,
    keys_FD: np.ndarray,
    experts: int,
    *,
    firing: Coactivation | None = None,
    seed: int = 0,
    starts: int = STARTS,
) -> np.ndarray:
    """Which neuron lies at each place, int32 [F], when M of them are an expert and experts follow one another.

    Neurons of an expert ascend, and experts are numbered by their first neuron. Which neurons are an expert together
    does not depend on how the layer's neurons were numbered, except where the order is itself the method. One thread
    does it all, so that results do not depend on the machine's number of cores.

    Args:
      method: `kmeans`: neurons of like keys, by balanced k-means of the directions of keys (the paper);
        `coactivation`: neurons that fire together, by balanced k-means of the leading N axes of their correlations;
        `contiguous`: neighbours; `random`: any.
      keys_FD: a row a neuron: its weights in the first layer, or in the gate of a gated layer.
      experts: N.
      firing: of the method `coactivation`, from calibration text.
      seed: of `random`, and of the starts of k-means.
      starts: of k-means; time is proportional to it, and one start comes within 0.5% of the sum of squares of the best.

    Raises:
      UserError: where an argument cannot work, or k-means has no library.
    """
    require_choice("method", method, METHODS)
    neurons = len(keys_FD)
    check_experts(neurons, experts)
    if method == "contiguous":
        return np.arange(neurons, dtype=np.int32)
    if method == "random":
        return _numbered(np.random.default_rng(seed).permutation(neurons).reshape(experts, -1))

    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        if method == "kmeans":
            keys_FD = np.asarray(keys_FD, np.float64)
            bad_F = ~np.isfinite(keys_FD).all(axis=1)
            require(
                not bad_F.any(),
                f"Keys of {bad_F.sum()} of {neurons} neurons, first that of neuron {bad_F.argmax()}, are not finite "
                "numbers: the checkpoint is damaged, or its training diverged.",
            )
            # Starts are drawn by place: sorted, the same keys have the same places however they were numbered.
            place_F = _sorted(keys_FD)
            vectors_FP = keys_FD[place_F]
        else:
            if firing is None:
                raise UserError("method='coactivation' needs to know which neurons fire together on calibration text.")
            correlation_FF = firing.correlation()
            require(
                len(correlation_FF) == neurons,
                f"Co-activations are of {len(correlation_FF)} neurons, but the layer has {neurons}.",
            )
            place_F = _sorted(np.sort(correlation_FF, axis=1)[:, ::-1])
            vectors_FP = _leading_axes(correlation_FF[np.ix_(place_F, place_F)], experts)
        label_F = _balanced_k_means(_unit(vectors_FP), experts, seed, starts)
    return _numbered(place_F[np.argsort(label_F, kind="stable")].reshape(experts, -1))


def cohesion(keys_FD: np.ndarray, order_F: np.ndarray, experts: int) -> float:
    """Mean cosine of the keys of two different neurons of an expert; 1 where experts are single neurons.

    With `experts` 1 it is that of any two neurons of the layer, which is what a random split has in the mean.
    """
    unit_FD = _unit(np.asarray(keys_FD, np.float64))
    unit_NMD = unit_FD[order_F].reshape(experts, -1, unit_FD.shape[-1])
    pairs = unit_NMD.shape[1] * (unit_NMD.shape[1] - 1) * experts
    if not pairs:
        return 1.0
    return float((np.square(unit_NMD.sum(axis=1)).sum() - np.square(unit_FD).sum()) / pairs)


def check_experts(neurons: int, experts: int) -> None:
    """Raises `UserError` unless so many neurons can be divided into so many experts of one size."""
    require(2 <= experts <= neurons, f"experts={experts} must lie in 2..{neurons}, the neurons of the layer.")
    require(
        neurons % experts == 0,
        f"experts={experts} does not divide the layer's {neurons} neurons, and experts are of one size; try "
        f"{nearest_divisors(experts, neurons, 2)}.",
    )


def _sorted(values_FP: np.ndarray) -> np.ndarray:
    """The order of rows by their first value, of ties by the second, and so on."""
    return np.lexsort(values_FP.T[::-1])


def _unit(vectors_FP: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of no direction, as a dead neuron's, are 0."""
    norm_F = np.linalg.norm(vectors_FP, axis=1)
    return vectors_FP / np.where(norm_F > 1e-9 * norm_F.max(), norm_F, np.inf)[:, None]


def _leading_axes(correlation_FF: np.ndarray, dimensions: int) -> np.ndarray:
    """Vectors [F, P] whose inner products are the correlations, as nearly as P dimensions allow.

    With P = F they are the neurons' traces of firing, centred, scaled and rotated. The leading ones hold the clusters
    (they are the relaxed solution of k-means: Ding and He, 2004); the others are mostly noise of single neurons.
    """
    from scipy.linalg import eigh

    neurons = len(correlation_FF)
    leading = (neurons - dimensions, neurons - 1)
    value_P, axes_FP = eigh(correlation_FF, subset_by_index=leading, overwrite_a=True, check_finite=False)
    return axes_FP * np.sqrt(np.maximum(value_P, 0))[None]


def _balanced_k_means(unit_FP: np.ndarray, experts: int, seed: int, starts: int) -> np.ndarray:
    """The cluster of each row [F], N of them of M rows each, with a small sum of squared distances to their means."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise UserError(
            "Clusters of one size need the package k-means-constrained: pip install 'emo_jax[emoe]', or split with "
            "method='contiguous' or 'random'."
        ) from error

    size = len(unit_FP) // experts
    means = KMeansConstrained(
        experts, size_min=size, size_max=size, n_init=starts, max_iter=_STEPS, random_state=seed, n_jobs=1
    )
    return means.fit_predict(unit_FP * _SCALE)


def _numbered(groups_NM: np.ndarray) -> np.ndarray:
    """Neurons expert by expert, int32 [F]: ascending in each, experts by their first."""
    groups_NM = np.sort(groups_NM, axis=1)
    return groups_NM[np.argsort(groups_NM[:, 0])].reshape(-1).astype(np.int32)
