"""The decoder: causal, blind to other documents, the same in chunks, named and initialised as documented.

Letters: B rows, S sequence, D model, H query heads, K key/value heads, N head width, V vocabulary.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.model import ModelConfig, abstract_parameters, bind, init_parameters, logical_axes
from emo_jax.model import attention as attention_module
from emo_jax.parallel import MeshConfig, make_mesh, param_sharding
from tests import oracle

B, S, V = 2, 12, 17
SEEDS = st.integers(0, 2**32 - 1)


def config(**fields) -> ModelConfig:
    fields = {"num_experts": 6, "num_shared_experts": 1, "top_k": 3, "d_dense": 10, "dtype": "float64"} | fields
    return ModelConfig(vocab_size=V, d_model=8, num_layers=2, num_heads=4, d_expert=6, rope_theta=100.0, **fields)


def random_parameters(model: ModelConfig, seed=0):
    """Every array random, the norms' scales too; drawn without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.5), abstract_parameters(model))


@functools.cache
def logits_of(name="mixed"):
    """Jitted (params, tokens, ids, positions) → logits [B, S, V] of a variant."""
    model = config(**VARIANTS[name])

    def run(params, tokens_BS, ids_BS, positions_BS):
        module = bind(model, params)
        return module.logits(module(tokens_BS, ids_BS, positions_BS, documents=S)[0])

    return jax.jit(run)


VARIANTS = {
    "mixed": {"num_kv_heads": 2, "experts_per_layer": (6, 0)},
    "normalised, no shared": {"num_shared_experts": 0, "top_k": 2, "normalize_top_k": True},
    "two shared, one key head": {"num_shared_experts": 2, "top_k": 4, "num_kv_heads": 1},
    "dense": {"num_experts": 0},
}


def documents(*rows):
    """ids and positions of rows given as document lengths, the rest padding."""
    ids_BS, positions_BS = np.zeros((len(rows), S), np.int32), np.zeros((len(rows), S), np.int32)
    for b, lengths in enumerate(rows):
        start = 0
        for g, length in enumerate(lengths, 1):
            ids_BS[b, start : start + length], positions_BS[b, start : start + length] = g, np.arange(length)
            start += length
    return ids_BS, positions_BS


def random_tokens(seed):
    return np.random.default_rng(seed).integers(0, V, (B, S)).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def wide():
    """float64 throughout, so that a real difference cannot pass for rounding."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_every_variant_are_the_oracles(name):
    model = config(**VARIANTS[name])
    params, tokens_BS = random_parameters(model), random_tokens(0)
    ids_BS, positions_BS = documents([5, 4], [12])
    logits_BSV = logits_of(name)(params, tokens_BS, ids_BS, positions_BS)
    batch = {"tokens": tokens_BS, "document_ids": ids_BS, "positions": positions_BS}
    wanted_BSV = oracle.forward(params, batch, oracle.Settings.of(model)).logits_BSV
    np.testing.assert_allclose(logits_BSV[ids_BS > 0], wanted_BSV[ids_BS > 0], rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, S - 1))
def test_a_later_token_changes_no_earlier_logits(seed, place):
    params, tokens_BS = random_parameters(config(**VARIANTS["mixed"])), random_tokens(seed)
    ids_BS, positions_BS = documents([7, 5], [12])
    changed_BS = tokens_BS.copy()
    changed_BS[:, place] = (changed_BS[:, place] + 1) % V
    before, after = (logits_of()(params, tokens, ids_BS, positions_BS) for tokens in (tokens_BS, changed_BS))
    np.testing.assert_allclose(after[:, :place], before[:, :place], rtol=1e-10, atol=1e-12)
    assert (np.abs(after[:, place] - before[:, place]).max(-1) > 1e-6).all()


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) <= S))
def test_a_packed_document_has_the_logits_it_has_alone(seed, lengths):
    params, tokens_BS = random_parameters(config(**VARIANTS["mixed"])), random_tokens(seed)
    together_BSV = logits_of()(params, tokens_BS, *documents(lengths, lengths))
    start = 0
    for length in lengths:
        alone_BS = np.zeros((B, S), np.int32)
        alone_BS[:, :length] = tokens_BS[:, start : start + length]
        alone_BSV = logits_of()(params, alone_BS, *documents([length], [length]))
        np.testing.assert_allclose(
            together_BSV[:, start : start + length], alone_BSV[:, :length], rtol=1e-10, atol=1e-12
        )
        start += length


def test_rotation_depends_on_distance_alone():
    """Scores of rotated queries and keys are equal where both move by as much."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, S, 1, 8))
    scores = []
    for shift in (0, 5):
        positions_BS = np.arange(S, dtype=np.int32)[None] + shift
        q, k = (np.asarray(attention_module.rotate(jnp.asarray(x), positions_BS, 100.0)) for x in (query, key))
        scores.append(q[0, :, 0] @ k[0, :, 0].T)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-9, atol=1e-12)


# Parameters


def paths(tree, prefix=""):
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from paths(branch, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", tuple(branch.shape)


def test_parameters_are_named_and_shaped_as_documented():
    model = config(**VARIANTS["mixed"])
    ffn = {"gate": (8, 10), "up": (8, 10), "down": (10, 8)}
    routed = {"gate": (5, 8, 6), "up": (5, 8, 6), "down": (5, 6, 8)}
    shared = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}
    attention = {"query": (8, 4, 2), "key": (8, 2, 2), "value": (8, 2, 2), "out": (4, 2, 8)}
    wanted = {"embedding": (V, 8), "head": (8, V), "final_norm": (8,)}
    for layer in ("layers/00", "layers/01"):
        wanted |= {f"{layer}/attention_norm": (8,), f"{layer}/ffn_norm": (8,)}
        wanted |= {f"{layer}/attention/{name}": shape for name, shape in attention.items()}
    wanted |= {"layers/00/moe/router": (8, 5)}
    wanted |= {f"layers/00/moe/routed/{name}": shape for name, shape in routed.items()}
    wanted |= {f"layers/00/moe/shared/{name}": shape for name, shape in shared.items()}
    wanted |= {f"layers/01/ffn/{name}": shape for name, shape in ffn.items()}
    assert dict(paths(abstract_parameters(model))) == wanted


LARGE = ModelConfig(
    vocab_size=2048, d_model=64, num_layers=2, num_heads=2, num_experts=9, top_k=3, d_expert=64, init_std=0.02
)


@pytest.fixture(scope="module")
def initial():
    with jax.enable_x64(False):
        return jax.device_get(init_parameters(LARGE, seed=3))


def test_initial_matrices_are_normal_cut_at_three_deviations_and_norms_are_ones(initial):
    density, mass = math.exp(-4.5) / math.sqrt(2 * math.pi), math.erf(3 / math.sqrt(2))
    std = 0.02 * math.sqrt(1 - 2 * 3 * density / mass)
    assert std == pytest.approx(0.02 * 0.98658, rel=1e-5)
    for path, leaf in jax.tree.leaves_with_path(initial):
        assert leaf.dtype == np.float32
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, 1)
            continue
        noise = 5 / math.sqrt(leaf.size)
        assert np.abs(leaf).max() <= 0.06 * (1 + 1e-6), path
        assert abs(leaf.mean()) < noise * std, path
        assert abs(leaf.std() / std - 1) < noise / math.sqrt(2), path
    embedding = initial["embedding"]  # large enough to tell the cut from none, and from one at two deviations
    assert np.abs(embedding).max() > 0.0585
    assert abs(embedding.std() / std - 1) < 0.007


def test_no_two_initial_matrices_are_alike(initial):
    starts = [tuple(leaf.ravel()[:8]) for leaf in jax.tree.leaves(initial) if leaf.ndim > 1]
    assert len(set(starts)) == len(starts)
    experts = initial["layers"]["00"]["moe"]["routed"]["gate"]
    assert len({tuple(expert.ravel()[:8]) for expert in experts}) == 8


def test_initial_parameters_depend_on_neither_sharding_nor_the_dtype_of_activations(initial):
    with jax.enable_x64(False):
        mesh = make_mesh(MeshConfig(data=1, fsdp=4), 4, jax.devices()[:4])
        places = jax.tree.map(
            lambda leaf, axes: param_sharding(mesh, axes, leaf.shape), abstract_parameters(LARGE), logical_axes(LARGE)
        )
        model = ModelConfig(**vars(LARGE) | {"dtype": "float32"})
        sharded = init_parameters(model, seed=3, shardings=places)
    whole, held = 0, [0] * 4
    for leaf in jax.tree.leaves(sharded):
        whole += leaf.nbytes
        for i, shard in enumerate(leaf.addressable_shards):
            held[i] += shard.data.nbytes
    np.testing.assert_allclose(held, whole / 4, rtol=0.01)  # the norms' scales stay whole
    for ours, wanted in zip(jax.tree.leaves(sharded), jax.tree.leaves(initial), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_another_seed_gives_other_initial_parameters(initial):
    with jax.enable_x64(False):
        other = init_parameters(LARGE, seed=4)
    for ours, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(initial), strict=True):
        assert ours.ndim == 1 or (np.asarray(ours) != wanted).mean() > 0.99
