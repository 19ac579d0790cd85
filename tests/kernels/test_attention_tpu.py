"""Attention of the released width, compiled ahead of time for a real TPU topology; no chip is needed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from emo_jax.kernels.attention import document_attention
from emo_jax.parallel import MeshConfig, batch_sharding, make_mesh, map_tokens

pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")


def compiled(
    implementation,
    topology="v5p:2x2x1",
    dtype=jnp.bfloat16,
    length=4096,
    heads=16,
    key_heads=16,
    width=128,
    causal=True,
):
    """Forward and backward, a row on each of the topology's chips."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(), len(devices), devices)
    attend = functools.partial(document_attention, implementation=implementation, causal=causal)
    attend = map_tokens(attend, mesh, token_args=4, check_vma=False)

    def run(query_BSHN, key_BSKN, value_BSKN, ids_BS, cotangent_BSHN):
        y_BSHN, pullback = jax.vjp(lambda *arrays: attend(*arrays, ids_BS), query_BSHN, key_BSKN, value_BSKN)
        return y_BSHN, *pullback(cotangent_BSHN)

    def rows(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((len(devices), length, *shape), dtype, sharding=batch_sharding(mesh))

    query, key = rows(heads, width), rows(key_heads, width)
    return jax.jit(run).lower(query, key, key, rows(dtype=jnp.int32), query).compile()


def test_the_kernel_keeps_far_less_than_all_scores():
    step = compiled("splash")
    hlo = step.as_text()
    assert hlo.count('custom_call_target="tpu_custom_call"') == 2  # Mosaic: forward, and one backward for all three
    assert not any(collective in hlo for collective in ("all-gather", "all-reduce", "all-to-all"))
    scores = 4 * 16 * 4096**2
    assert step.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.parametrize("length, kernels", [(512, 2), (10_240, 3)])  # the backward pass in one kernel, or in two
def test_the_kernel_takes_a_whole_row_of_an_encoder(length, kernels):
    step = compiled("splash", length=length, heads=12, key_heads=12, width=64, causal=False)
    assert step.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    assert step.memory_analysis().temp_size_in_bytes < 4 * 12 * length**2
