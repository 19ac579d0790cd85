"""Attention within documents: every formulation against the reference, and the reference against a loop.

Letters: B rows, S sequence, H query heads, K key/value heads, N head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from emo_jax.errors import UserError
from emo_jax.kernels.attention import IMPLEMENTATIONS, default_implementation, document_attention, op, reference
from emo_jax.model import attention
from emo_jax.parallel import MeshConfig, make_mesh, map_tokens

SEEDS = st.integers(0, 2**32 - 1)
CAUSAL = pytest.mark.parametrize("causal", [True, False])
LAYOUTS = {"one document": [256], "many": [5, 1, 1, 120, 1, 100, 28], "single tokens": [1] * 200, "padding": []}


def documents(lengths, size):
    """One row of ids: documents of these lengths from 1 on, the rest padding."""
    ids_S = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:size]
    return np.pad(ids_S, (0, size - len(ids_S))).astype(np.int32)


def random_arguments(ids_BS, heads, key_heads, width, seed=0, dtype="float64"):
    """Query, key and value, the ids, and a cotangent of the result."""
    rng = np.random.default_rng(seed)
    shapes = [(*ids_BS.shape, some, width) for some in (heads, key_heads, key_heads, heads)]
    query, key, value, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return query, key, value, jnp.asarray(ids_BS), cotangent


def value_and_gradients(attend):
    """Jitted: the result, and the cotangents of query, key and value."""

    def run(query_BSHN, key_BSKN, value_BSKN, ids_BS, cotangent_BSHN):
        y_BSHN, pullback = jax.vjp(lambda *arrays: attend(*arrays, ids_BS), query_BSHN, key_BSKN, value_BSKN)
        return y_BSHN, *pullback(cotangent_BSHN)

    return jax.jit(run)


def of(implementation, causal=True):
    return functools.partial(document_attention, implementation=implementation, causal=causal)


@functools.cache
def exact(causal=True):
    return value_and_gradients(of("reference", causal))


def assert_close(ours, wanted, tolerance):
    for name, our, want in zip(("y", "query", "key", "value"), ours, wanted, strict=True):
        assert our.dtype == want.dtype, name
        our, want = (np.asarray(a, np.float64) for a in (our, want))
        np.testing.assert_allclose(our, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=name)


def loop(query_BSHN, key_BSKN, value_BSKN, ids_BS, causal):
    """One token at a time."""
    rows, length, heads, width = query_BSHN.shape
    y_BSHN = np.zeros_like(query_BSHN)
    for b, s, h in np.ndindex(rows, length, heads):
        k = h * key_BSKN.shape[2] // heads
        seen = [t for t in range(s + 1 if causal else length) if ids_BS[b, t] == ids_BS[b, s]]
        share = np.exp(key_BSKN[b, seen, k] @ query_BSHN[b, s, h] / math.sqrt(width))
        y_BSHN[b, s, h] = share / share.sum() @ value_BSKN[b, seen, k]
    return y_BSHN


@CAUSAL
@pytest.mark.parametrize("lengths", [[9], [1, 4, 1], []])
def test_the_reference_is_a_loop_over_tokens_and_what_they_see(lengths, causal):
    with jax.enable_x64(True):
        *arguments, _ = random_arguments(np.stack([documents(lengths, 9), documents([2, 7], 9)]), 4, 2, 3)
        wanted = loop(*map(np.asarray, arguments), causal)
        np.testing.assert_allclose(reference(*arguments, causal=causal), wanted, rtol=1e-12, atol=1e-12)


@CAUSAL
@pytest.mark.parametrize("size, chunk, heads, key_heads", [(1, 4, 1, 1), (7, 512, 4, 2), (13, 4, 3, 3), (19, 5, 4, 1)])
def test_chunks_of_queries_and_their_gradients_are_the_references(monkeypatch, size, chunk, heads, key_heads, causal):
    monkeypatch.setattr(op, "QUERY_CHUNK", chunk)
    chunked = value_and_gradients(of("chunked", causal))

    @settings(deadline=None, max_examples=15)
    @given(SEEDS, st.lists(st.integers(1, size), max_size=size))
    @example(0, [])
    @example(0, [size])
    @example(0, [1] * size)
    def check(seed, lengths):
        with jax.enable_x64(True):
            ids_BS = np.stack([documents(lengths, size), documents([size // 2], size)])
            arguments = random_arguments(ids_BS, heads, key_heads, 4, seed)
            assert_close(chunked(*arguments), exact(causal)(*arguments), 1e-11)

    check()


def test_chunks_in_bfloat16_stay_within_their_tolerance_of_the_reference():
    chunked = value_and_gradients(of("chunked"))
    for lengths in LAYOUTS.values():
        arguments = random_arguments(documents(lengths, 300)[None], 4, 2, 8, dtype="bfloat16")
        assert_close(chunked(*arguments), exact()(*arguments), 3e-2)


@CAUSAL
@pytest.mark.parametrize("shares", [1, 2])  # two kernels for the backward pass, or one
@pytest.mark.parametrize("heads, key_heads, dtype, tolerance", [(2, 2, "float32", 1e-5), (4, 2, "bfloat16", 2e-2)])
def test_the_kernel_for_tpu_is_the_reference(monkeypatch, heads, key_heads, dtype, tolerance, shares, causal):
    monkeypatch.setattr(op, "SPLASH_BLOCK", 128)  # so that there is more than one
    monkeypatch.setattr(op, "SPLASH_SHARES", shares)
    splash = value_and_gradients(functools.partial(op._splash, interpret=True, causal=causal))
    for lengths in LAYOUTS.values():
        ids_BS = np.stack([documents(lengths, 256), documents([130], 256)])
        arguments = random_arguments(ids_BS, heads, key_heads, 64, dtype=dtype)
        assert_close(splash(*arguments), exact(causal)(*arguments), tolerance)


def in_parts(attend, parts):
    """As devices that share a row do: each computes its own queries, and knows which they are only as it runs."""

    def run(query_BSHN, key_BSKN, value_BSKN, ids_BS):
        given = enumerate(jnp.split(query_BSHN, parts, axis=1))
        ours = [
            attend(q, key_BSKN, value_BSKN, ids_BS, part=(jnp.int32(i) + 0 * ids_BS[0, 0], parts)) for i, q in given
        ]
        return jnp.concatenate(ours, axis=1)

    return value_and_gradients(run)


@CAUSAL
@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_parts_of_a_row_are_the_row(monkeypatch, implementation, chunk, causal):
    monkeypatch.setattr(op, "QUERY_CHUNK", chunk)
    attend = in_parts(of(implementation, causal), 3)
    with jax.enable_x64(True):
        for lengths in ([24], [5, 1, 12, 2], [1] * 20, []):
            ids_BS = np.stack([documents(lengths, 24), documents([11], 24)])
            arguments = random_arguments(ids_BS, 4, 2, 4)
            assert_close(attend(*arguments), exact(causal)(*arguments), 1e-11)


@CAUSAL
@pytest.mark.parametrize("shares", [1, 4])
def test_the_kernel_for_tpu_takes_a_part_of_a_row(monkeypatch, shares, causal):
    monkeypatch.setattr(op, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(op, "SPLASH_SHARES", shares)
    splash = in_parts(functools.partial(op._splash, interpret=True, causal=causal), 2)
    for lengths in ([512], [5, 1, 300, 60]):
        arguments = random_arguments(documents(lengths, 512)[None], 2, 1, 64, dtype="float32")
        assert_close(splash(*arguments), exact(causal)(*arguments), 1e-5)


def test_the_kernel_for_tpu_runs_on_each_devices_rows_and_so_do_its_gradients(monkeypatch):
    monkeypatch.setattr(op, "SPLASH_BLOCK", 128)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), 4, jax.devices()[:4])
    ids_BS = np.stack([documents(lengths, 256) for lengths in LAYOUTS.values()])
    arguments = random_arguments(ids_BS, 2, 1, 64, dtype="float32")
    splash = functools.partial(op._splash, interpret=True)
    mapped = value_and_gradients(map_tokens(splash, mesh, token_args=4, check_vma=False))
    assert_close(mapped(*arguments), exact()(*arguments), 1e-5)


@CAUSAL
def test_devices_that_share_rows_attend_to_all_of_them_with_the_kernel_for_tpu(monkeypatch, causal):
    """The kernel runs in a map that is not checked (check_vma): its gradients must be those of whole rows."""
    monkeypatch.setattr(op, "SPLASH_BLOCK", 128)
    monkeypatch.setattr(op, "_splash", functools.partial(op._splash, interpret=True))
    monkeypatch.setattr(attention, "default_implementation", lambda platform: "splash")
    mesh = make_mesh(MeshConfig(data=2, context=2), 2, jax.devices()[:4], length=256)
    ids_BS = np.stack([documents([256], 256), documents([100, 90, 40], 256)])
    arguments = random_arguments(ids_BS, 2, 1, 64, dtype="float32")
    mapped = value_and_gradients(lambda *given: attention._attend(*given, mesh, causal))
    assert_close(mapped(*arguments), exact(causal)(*arguments), 1e-5)


@CAUSAL
def test_the_kernel_for_gpu_is_the_reference(causal):
    kernel = value_and_gradients(functools.partial(op._pallas_gpu, interpret=True, causal=causal))
    for lengths in LAYOUTS.values():
        ids_BS = np.stack([documents(lengths, 256), documents([130], 256)])
        arguments = random_arguments(ids_BS, 4, 2, 64, dtype="bfloat16")
        assert_close(kernel(*arguments), exact(causal)(*arguments), 2e-2)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_the_kernel_for_gpu_lowers_at_the_released_width():
    """To Triton's language alone: what its compiler says, and what it computes, takes a GPU."""
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    tokens, heads = jax.ShapeDtypeStruct((1, 4096), "int32"), jax.ShapeDtypeStruct((1, 4096, 16, 128), "bfloat16")
    with use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Explicit,), abstract_device=gpu)):
        traced = value_and_gradients(of("pallas_gpu")).trace(heads, heads, heads, tokens, heads)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3  # forward, a row sum, and backward
    assert "4096x4096" not in program


@CAUSAL
@pytest.mark.parametrize("implementation", ["splash", "pallas_gpu"])
@pytest.mark.parametrize("size, width, dtype", [(100, 64, "bfloat16"), (128, 32, "bfloat16"), (128, 64, "float64")])
def test_what_a_kernel_does_not_take_goes_through_in_chunks(implementation, size, width, dtype, causal):
    with jax.enable_x64(True):
        *arguments, _ = random_arguments(documents([size - 3], size)[None], 2, 1, width, dtype=dtype)
        ours, wanted = (jax.jit(of(name, causal))(*arguments) for name in (implementation, "chunked"))
        np.testing.assert_array_equal(ours, wanted)


def test_an_unknown_implementation_is_refused_with_the_nearest_name():
    *arguments, _ = random_arguments(documents([2], 2)[None], 1, 1, 2, dtype="float32")
    with pytest.raises(UserError, match=r"implementation='splsh'.*Did you mean 'splash'\?"):
        document_attention(*arguments, implementation="splsh")


def test_every_platform_has_a_default():
    defaults = {default_implementation(platform) for platform in ("cpu", "gpu", "tpu")}
    assert defaults == set(IMPLEMENTATIONS) - {"reference"}
