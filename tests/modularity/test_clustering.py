"""Neurons divided into experts: sizes, what each method finds, and that it finds the same however neurons are numbered.

Letters: F hidden neurons, D model, N experts, T tokens.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emo_jax.errors import UserError
from emo_jax.modularity.clustering import METHODS, check_experts, coactivation, cohesion, neuron_order


def planted(experts: int, size: int, width: int, seed: int, noise: float = 0.3):
    """Keys [F, D] around a direction for each group, of any length, and their groups [F], in random order."""
    rng = np.random.default_rng(seed)
    centre_ND = np.linalg.qr(rng.normal(size=(width, experts)))[0].T
    group_F = rng.permutation(np.repeat(np.arange(experts), size))
    keys_FD = centre_ND[group_F] + noise * rng.normal(size=(len(group_F), width)) / np.sqrt(width)
    return keys_FD * rng.uniform(0.1, 10, size=(len(group_F), 1)), group_F


def planted_firing(experts: int, size: int, seed: int, tokens: int = 2000):
    """Inputs of activation functions [T, F]: groups fire together, at rates of their own, and often alone."""
    rng = np.random.default_rng(seed)
    group_F = rng.permutation(np.repeat(np.arange(experts), size))
    topic_TN = rng.random((tokens, experts)) < 0.2
    follows_TF = rng.random((tokens, len(group_F))) < rng.uniform(0.3, 0.8, len(group_F))[None]
    alone_TF = rng.random((tokens, len(group_F))) < rng.uniform(0.02, 0.3, len(group_F))[None]
    fires_TF = topic_TN[:, group_F] & follows_TF | alone_TF
    return np.where(fires_TF, 1, -1) * rng.exponential(size=fires_TF.shape), group_F


def groups(order_F, experts: int, names=None):
    """The experts as a set of sets of neurons, or of what neurons are called."""
    names = range(len(order_F)) if names is None else names
    return sorted(sorted(names[i] for i in expert) for expert in np.reshape(order_F, (experts, -1)))


def spread(keys_FD, order_F, experts: int) -> float:
    """Sum of squared distances of the unit keys to the means of their experts."""
    unit_FD = keys_FD / np.linalg.norm(keys_FD, axis=1, keepdims=True)
    unit_NMD = unit_FD[order_F].reshape(experts, -1, keys_FD.shape[1])
    return np.square(unit_NMD - unit_NMD.mean(axis=1, keepdims=True)).sum()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(METHODS),
    st.integers(2, 6),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
@example("kmeans", 5, 3, 4, -1, np.float32)  # all keys are 0
@example("coactivation", 5, 3, 4, -1, np.float32)  # and no neuron ever fires
def test_each_neuron_has_one_place_and_experts_are_in_canonical_order(method, experts, size, width, seed, dtype):
    rng, neurons = np.random.default_rng(abs(seed)), experts * size
    keys_FD = rng.normal(size=(neurons, width)).astype(dtype)
    keys_FD[rng.random(neurons) < (0.2 if seed >= 0 else 1)] = 0
    firing = coactivation(rng.normal(size=(20, width)) @ keys_FD.T)
    order_F = neuron_order(method, keys_FD, experts, firing=firing, seed=abs(seed), starts=2)
    assert order_F.dtype == np.int32
    assert sorted(order_F) == list(range(neurons))
    order_NM = order_F.reshape(experts, size)
    assert (np.diff(order_NM, axis=1) > 0).all() and (np.diff(order_NM[:, 0]) > 0).all()


@pytest.mark.parametrize("experts,size,width", [(2, 8, 16), (6, 10, 24), (16, 12, 20)])
def test_kmeans_recovers_planted_groups_whatever_the_lengths_of_keys(experts, size, width):
    keys_FD, group_F = planted(experts, size, width, seed=experts)
    order_F = neuron_order("kmeans", keys_FD, experts)
    assert groups(order_F, experts) == groups(np.argsort(group_F, kind="stable"), experts)


def test_kmeans_tells_groups_apart_whose_keys_differ_little():
    keys_FD, group_F = planted(4, 8, 16, seed=0)
    keys_FD = keys_FD / np.linalg.norm(keys_FD, axis=1, keepdims=True) + 750
    order_F = neuron_order("kmeans", keys_FD, 4)
    assert groups(order_F, 4) == groups(np.argsort(group_F, kind="stable"), 4)


@pytest.mark.parametrize("experts,size", [(2, 6), (6, 10), (12, 8)])
def test_coactivation_recovers_planted_groups(experts, size):
    hidden_TF, group_F = planted_firing(experts, size, seed=experts)
    rng = np.random.default_rng(0)
    order_F = neuron_order("coactivation", rng.normal(size=(len(group_F), 3)), experts, firing=coactivation(hidden_TF))
    assert groups(order_F, experts) == groups(np.argsort(group_F, kind="stable"), experts)


@pytest.mark.parametrize("neurons,experts", [(8, 2), (6, 3), (8, 4), (9, 3)])
def test_kmeans_comes_near_the_best_of_all_partitions(neurons, experts):
    def partitions(left):
        if not left:
            yield []
            return
        for others in itertools.combinations(left[1:], neurons // experts - 1):
            rest = [i for i in left if i != left[0] and i not in others]
            yield from ([left[0], *others, *after] for after in partitions(rest))

    ratios = []
    for seed in range(8):
        keys_FD = np.random.default_rng(seed).normal(size=(neurons, 3))
        best = min(spread(keys_FD, np.array(order), experts) for order in partitions(list(range(neurons))))
        ratios.append(spread(keys_FD, neuron_order("kmeans", keys_FD, experts), experts) / best)
    assert min(ratios) > 1 - 1e-9
    assert np.mean(ratios) < 1.02 and max(ratios) < 1.1


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31), st.booleans())
def test_kmeans_finds_the_same_groups_of_keys_however_neurons_are_numbered(experts, size, width, seed, coarse):
    rng, neurons = np.random.default_rng(seed), experts * size
    keys_FD = rng.normal(size=(neurons, width)).astype(np.float32)
    if coarse:  # many equal keys, equal directions and zeros
        keys_FD = np.round(keys_FD)
    again_F = rng.permutation(neurons)
    one, other = (
        groups(neuron_order("kmeans", keys, experts, seed=seed, starts=3), experts, keys.tolist())
        for keys in (keys_FD, np.asfortranarray(keys_FD[again_F]))
    )
    assert one == other


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 2**31))
def test_coactivation_finds_the_same_groups_however_neurons_are_numbered(experts, size, seed):
    rng, neurons = np.random.default_rng(seed), experts * size
    hidden_TF = rng.normal(size=(300, 4)) @ rng.normal(size=(4, neurons))  # nothing that every start would find
    again_F = rng.permutation(neurons)
    orders = [
        neuron_order("coactivation", hidden.T, experts, firing=coactivation(hidden), seed=seed, starts=1)
        for hidden in (hidden_TF, hidden_TF[:, again_F])
    ]
    assert groups(orders[0], experts) == groups(orders[1], experts, again_F)


def test_a_split_is_the_same_in_another_process_which_loads_the_library_only_then():
    program = (
        "import sys; import numpy as np; from emo_jax.modularity.clustering import neuron_order;"
        "assert 'k_means_constrained' not in sys.modules and 'ortools' not in sys.modules;"
        "keys = np.random.default_rng(3).normal(size=(256, 64)); print(neuron_order('kmeans', keys, 8).tolist())"
    )
    threads = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=threads).stdout
    keys_FD = np.random.default_rng(3).normal(size=(256, 64))
    orders = [neuron_order("kmeans", keys_FD, 8).tolist() for _ in range(2)]
    assert printed.strip() == str(orders[0]) == str(orders[1])


def test_contiguous_keeps_the_order_and_random_follows_its_seed():
    keys_FD = np.random.default_rng(0).normal(size=(60, 4))
    assert neuron_order("contiguous", keys_FD, 6).tolist() == list(range(60))
    orders = [tuple(neuron_order("random", keys_FD, 6, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    together = np.zeros((60, 60))
    for seed in range(400):
        for expert in neuron_order("random", keys_FD, 6, seed=seed).reshape(6, 10):
            together[np.ix_(expert, expert)] += 1 / 400
    other = together[~np.eye(60, dtype=bool)]
    assert abs(other.mean() - 9 / 59) < 1e-9 and abs(other - 9 / 59).max() < 0.1


def test_dead_neurons_are_placed_and_change_no_other_number():
    keys_FD, group_F = planted(4, 6, 16, seed=0)
    keys_FD[5] = 0
    order_F = neuron_order("kmeans", keys_FD, 4)
    alive = [sorted(set(expert) - {5}) for expert in order_F.reshape(4, 6)]
    assert all(len(set(group_F[expert])) == 1 for expert in alive)
    assert np.isfinite(cohesion(keys_FD, order_F, 4))


def test_cohesion_is_the_mean_cosine_of_pairs():
    keys_FD, _ = planted(3, 4, 8, seed=1)
    order_F = neuron_order("kmeans", keys_FD, 3)
    unit_FD = keys_FD / np.linalg.norm(keys_FD, axis=1, keepdims=True)
    cosines = [
        unit_FD[i] @ unit_FD[j] for expert in order_F.reshape(3, 4) for i, j in itertools.combinations(expert, 2)
    ]
    np.testing.assert_allclose(cohesion(keys_FD, order_F, 3), np.mean(cosines), rtol=1e-12)
    draws = [cohesion(keys_FD, neuron_order("random", keys_FD, 3, seed=seed), 3) for seed in range(300)]
    np.testing.assert_allclose(cohesion(keys_FD, order_F, 1), np.mean(draws), atol=0.02)
    assert cohesion(keys_FD, order_F, 3) > 0.8 > 0.5 > cohesion(keys_FD, order_F, 1)
    assert cohesion(keys_FD, np.arange(12), 12) == 1


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_coactivations_of_batches_add_up_to_the_correlation_of_all(first, second, neurons, seed):
    rng = np.random.default_rng(seed)
    hidden_TF = rng.normal(size=(first + second, neurons)) + rng.normal(size=neurons)[None]
    parts = coactivation(hidden_TF[:first]) + coactivation(hidden_TF[first:])
    assert parts.tokens == first + second
    np.testing.assert_array_equal(parts.joint_FF, coactivation(hidden_TF).joint_FF)
    fired_TF = (hidden_TF > 0).astype(float)
    varies_F = fired_TF.std(axis=0) > 0
    wanted_FF = np.zeros((neurons, neurons))
    wanted_FF[np.ix_(varies_F, varies_F)] = np.corrcoef(fired_TF[:, varies_F], rowvar=False)
    np.testing.assert_allclose(parts.correlation(), wanted_FF, atol=1e-12)


@pytest.mark.parametrize(
    "neurons,experts,words",
    [
        (3072, 65, "experts=65 does not divide the layer's 3072 neurons, and experts are of one size; try 64 or 96."),
        (10, 3, "try 2 or 5"),
        (7, 3, "try 7"),
        (8, 1, r"experts=1 must lie in 2\.\.8"),
        (8, 16, r"experts=16 must lie in 2\.\.8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(neurons, experts, words):
    with pytest.raises(UserError, match=words):
        check_experts(neurons, experts)
    with pytest.raises(UserError, match=words):
        neuron_order("contiguous", np.zeros((neurons, 1)), experts)


def test_mistakes_are_refused(monkeypatch):
    keys_FD = np.random.default_rng(0).normal(size=(8, 4))
    with pytest.raises(UserError, match=r"method='kmean' is not one of .* Did you mean 'kmeans'"):
        neuron_order("kmean", keys_FD, 2)
    with pytest.raises(UserError, match="calibration text"):
        neuron_order("coactivation", keys_FD, 2)
    with pytest.raises(UserError, match="of 6 neurons, but the layer has 8"):
        neuron_order("coactivation", keys_FD, 2, firing=coactivation(np.zeros((5, 6))))
    monkeypatch.setitem(sys.modules, "k_means_constrained", None)
    with pytest.raises(UserError, match=r"pip install 'emo_jax\[emoe\]'"):
        neuron_order("kmeans", keys_FD, 2)
    keys_FD[[3, 6], 1] = np.nan, np.inf
    with pytest.raises(UserError, match="Keys of 2 of 8 neurons, first that of neuron 3, are not finite"):
        neuron_order("kmeans", keys_FD, 2)
