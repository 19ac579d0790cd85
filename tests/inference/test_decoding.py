"""Decoding against whole forward passes and NumPy: tokens, pools, draws, compiles and bytes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.errors import UserError
from emo_jax.inference import Generator, Sampling, fixed_pools, pool_size
from emo_jax.inference.decoding import SHORTEST
from emo_jax.model import Kept, ModelConfig, PoolConfig, bind, init_parameters
from emo_jax.model.attention import KeyValues, Past

SMALL = ModelConfig(
    vocab_size=61,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    top_k=4,
    d_expert=16,
    num_experts=9,
    experts_per_layer=(9, 0, 6),
    d_dense=24,
    qk_norm=True,
    dtype="float32",
)
PROMPTS = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (5, 31, 17)]


@functools.cache
def parameters(**changes):
    params = init_parameters(dataclasses.replace(SMALL, **changes), 0)
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)  # far from uniform, so that errors show


def forward(config, params, rows, **options):
    """Logits [B, S, V] of whole rows, each one document that starts at slot 0; all are padded to one length."""
    tokens_BS = np.zeros((len(rows), 64), np.int32)
    for i, row in enumerate(rows):
        tokens_BS[i, : len(row)] = row
    ids_BS = jnp.asarray([[int(s < len(row)) for s in range(64)] for row in rows])
    positions_BS = jnp.broadcast_to(jnp.arange(64).reshape(1, -1), tokens_BS.shape)

    @jax.jit
    def run(params, tokens_BS):
        model = bind(config, params)
        hidden_BSD, routings = model(tokens_BS, ids_BS, positions_BS, **options)
        return model.logits(hidden_BSD), [routing.indices_BSC for routing in routings]

    return run(params, tokens_BS)


def written(generator, params, prompts, number, **options):
    """Tokens [B, number]."""
    return np.stack(jax.device_get(list(generator(params, prompts, number, **options))), axis=1)


@pytest.mark.parametrize("changes", [{}, {"norm_placement": "post", "num_shared_experts": 0}], ids=["pre", "post"])
def test_prefill_then_decode_is_one_whole_forward_pass(changes):
    config, params = dataclasses.replace(SMALL, **changes), parameters(**changes)
    rows = [[*prompt, *range(10)] for prompt in PROMPTS]
    expected_BSV, _ = forward(config, params, rows)
    length, slots = 32, 48
    tokens_BS, ids_BS = np.zeros((3, length), np.int32), np.zeros((3, length), np.int32)
    for i, prompt in enumerate(PROMPTS):
        tokens_BS[i, length - len(prompt) :], ids_BS[i, length - len(prompt) :] = prompt, 1
    start_B = jnp.asarray(length - ids_BS.sum(1))

    @jax.jit
    def prefill(params):
        model = bind(config, params)
        positions_BS = jnp.maximum(jnp.arange(length).reshape(1, -1) - start_B[:, None], 0)
        hidden_BSD, _, seen = model.extend(tokens_BS, ids_BS, positions_BS)
        seen = [KeyValues(*(jnp.pad(x, ((0, 0), (0, slots - length), (0, 0), (0, 0))) for x in own)) for own in seen]
        return model.logits(hidden_BSD), seen

    @jax.jit
    def decode(params, seen, token_B, slot):
        model = bind(config, params)
        past = [Past(own, start_B, slot) for own in seen]
        hidden_B1D, _, seen = model.extend(
            token_B[:, None], jnp.ones((3, 1), jnp.int32), (slot - start_B)[:, None], past=past
        )
        return model.logits(hidden_B1D)[:, 0], seen

    logits_BSV, seen = prefill(params)
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(
            logits_BSV[i, length - len(prompt) :], expected_BSV[i, : len(prompt)], rtol=0, atol=1e-4
        )
    for n in range(10):
        logits_BV, seen = decode(params, seen, jnp.full(3, n), jnp.int32(length + n))
        for i, prompt in enumerate(PROMPTS):
            np.testing.assert_allclose(logits_BV[i], expected_BSV[i, len(prompt) + n], rtol=0, atol=1e-4)


def test_greedy_tokens_are_the_most_likely_ones_and_no_length_compiles_anew():
    generator, params = Generator(SMALL), parameters()
    found_BN = written(generator, params, PROMPTS, 12)
    logits_BSV, _ = forward(SMALL, params, [[*p, *new] for p, new in zip(PROMPTS, found_BN, strict=True)])
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(found_BN[i], logits_BSV[i, len(prompt) - 1 :][:12].argmax(-1))
    others = [prompt[:n] for prompt, n in zip(PROMPTS, (1, 30, 9), strict=True)]
    written(generator, params, others, 20)
    assert generator._prefill._cache_size() == generator._decode._cache_size() == 1
    written(generator, params, [PROMPTS[1] * 2] * 3, 12)  # the next bucket, with the same cache
    assert (generator._prefill._cache_size(), generator._decode._cache_size()) == (2, 1)
    assert SHORTEST == 32


@pytest.mark.parametrize("subset", [False, True])
def test_a_pool_from_the_prompt_is_frozen(subset):
    params, size = parameters(), 4
    kept = None
    if subset:
        kept = [Kept(jnp.arange(8) > 2, jnp.array(True)), Kept(jnp.arange(5) > 0, jnp.array(True))]
    found_BN = written(Generator(SMALL), params, PROMPTS, 12, pool=size, kept=kept)
    assert subset or (found_BN != written(Generator(SMALL), params, PROMPTS, 12)).any()
    rows = [[*p, *new] for p, new in zip(PROMPTS, found_BN, strict=True)]
    voters_BS = jnp.asarray([[s < len(prompt) for s in range(64)] for prompt in PROMPTS])
    pool = PoolConfig(kind="document", min=size, max=size)
    options = {"pool": pool, "draws": fixed_pools(size, 3, 2), "voters_BS": voters_BS, "kept": kept}
    logits_BSV, indices = forward(SMALL, params, rows, **options)
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(found_BN[i], logits_BSV[i, len(prompt) - 1 :][:12].argmax(-1))
        for layer, indices_BSC in enumerate(indices):
            used = set(np.unique(indices_BSC[i, : len(rows[i])]).tolist())
            assert len(used) <= size
            assert not subset or used <= set(np.flatnonzero(kept[layer].mask_R).tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.7)])
def test_draws_follow_the_limited_distribution(top_k, top_p):
    config, params = dataclasses.replace(SMALL, num_layers=1, experts_per_layer=(9,)), parameters()
    params = params | {"layers": {"00": params["layers"]["00"]}}
    rows, temperature, vocabulary = 4000, 1.3, 50
    sampling = Sampling(temperature, top_k, top_p, seed=1)
    tokens_B = written(Generator(config), params, [[3, 7]] * rows, 1, sampling=sampling, vocabulary=vocabulary)[:, 0]
    logits_V = np.asarray(forward(config, params, [[3, 7]])[0][0, 1, :vocabulary], np.float64) / temperature
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    order = np.argsort(-p_V)
    before = np.cumsum(p_V[order]) - p_V[order]
    stays = order[(before < top_p) & (np.arange(vocabulary) < (top_k or vocabulary))]
    limited_V = np.zeros(vocabulary)
    limited_V[stays] = p_V[stays] / p_V[stays].sum()
    share_V = np.bincount(tokens_B, minlength=vocabulary) / rows
    assert len(share_V) == vocabulary and not share_V[limited_V == 0].any()
    deviation_V = np.sqrt(limited_V * (1 - limited_V) / rows)
    assert (np.abs(share_V - limited_V) <= 4.5 * deviation_V + 1e-9).all()


def test_a_rows_draws_do_not_depend_on_other_rows_and_a_seed_repeats():
    generator, params = Generator(SMALL), parameters()
    hot = Sampling(temperature=1.0, seed=4)
    first_BN = written(generator, params, PROMPTS, 8, sampling=hot)
    np.testing.assert_array_equal(first_BN, written(generator, params, PROMPTS, 8, sampling=hot))
    changed_BN = written(generator, params, [PROMPTS[0], [1], [2]], 8, sampling=hot)
    np.testing.assert_array_equal(first_BN[0], changed_BN[0])
    assert (first_BN[0] != written(generator, params, [[5], PROMPTS[0], [2]], 8, sampling=hot)[1]).any()
    assert (first_BN != written(generator, params, PROMPTS, 8, sampling=Sampling(1.0, seed=5))).any()


@pytest.mark.parametrize("experts", [16, 128])
def test_decoding_one_token_reads_no_expert_but_the_chosen_ones(experts):
    config = ModelConfig(
        vocab_size=32,
        d_model=64,
        num_layers=1,
        num_heads=2,
        num_experts=experts,
        top_k=4,
        d_expert=256,
        dtype="float32",
    )
    generator, params = Generator(config), jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_parameters(config, 0))
    hlo = compiled_decode(generator, params).as_text()
    stack = rf"bf16\[{experts - 1},(?:64,256|256,64)\]"
    holding = set(re.findall(rf"(%\S+) = {stack}", hlo))  # names of arrays of all experts' weights
    slices = []
    for line in hlo.splitlines():
        operation = re.search(r"= [^=]*?[\])}] ([a-z-]+)\((.*?)\)(?:, |$)", line)
        if operation and holding & set(re.findall(r"%[\w.-]+", operation.group(2))):
            assert operation.group(1) in ("tuple", "fusion", "call", "while", "dynamic-slice"), line
            assert not re.search(rf"= {stack}", line), line  # none is made anew, copied or converted
            if operation.group(1) == "dynamic-slice":
                slices.append(re.search(r"dynamic_slice_sizes={([\d,]+)}", line).group(1))
    assert sorted(slices) == ["1,256,64", "1,64,256", "1,64,256"]  # gate, up and down of one expert, for each choice


def compiled_decode(generator, params):
    """The decoding step of one row."""
    caught = []

    def catch(params, cache, *rest, **how):
        caught.append((params, cache, *rest))
        return rest[0], cache

    original, generator._decode = generator._decode, catch
    list(generator(params, [[1, 2]], 2))
    return original.lower(*caught[0], sampled=False, limited=False).compile()


def test_bad_arguments_are_refused_in_words():
    for text, words in [
        ("prompt", r"pool='prompt' must be none, or prompt:N"),
        ("prompt:x", "must be none, or prompt:N"),
        ("prompt:2", r"at least the 3 routed experts"),
    ]:
        with pytest.raises(UserError, match=words):
            pool_size(text, SMALL)
    with pytest.raises(UserError, match="this model is dense"):
        pool_size("prompt:8", dataclasses.replace(SMALL, experts_per_layer=(), num_experts=0))
    assert (pool_size("none", SMALL), pool_size("prompt:8", SMALL)) == (0, 8)
    for values, words in [
        ({"temperature": -1.0}, r"temperature=-1\.0 must not be negative"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0\.0 must lie in \(0, 1\]"),
    ]:
        with pytest.raises(UserError, match=words):
            Sampling(**values)
    for prompts, words in [([[]], "A prompt is empty"), ([[61]], r"0\.\.60 \(the vocabulary\); found \[61\]")]:
        with pytest.raises(UserError, match=words):
            next(Generator(SMALL)({}, prompts, 1))
