"""A decoding step of the released width, compiled ahead of time for a real TPU topology; no chip is needed."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from emo_jax.inference import Generator
from emo_jax.inference.decoding import Cache, _Limits
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.model.attention import KeyValues

pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")


def test_a_token_of_the_released_width_copies_no_expert_stack():
    """XLA for TPU cuts a gather of the chosen experts into gathers over copies of the stacks; this has none."""
    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0])

    def on_chip(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    config = ModelConfig(num_layers=1)
    params = jax.tree.map(lambda leaf: on_chip(leaf.shape, jnp.bfloat16), abstract_parameters(config))
    seen = [KeyValues(*(on_chip((1, 1024, 16, 128), jnp.bfloat16) for _ in range(2)))]
    cache = Cache(seen, on_chip((1,), jnp.int32), on_chip((), jnp.int32))
    key = on_chip((), jax.random.key(0, impl="threefry2x32").dtype)
    limits = _Limits(key, *(on_chip((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int32)))
    step = Generator(config)._decode.lower(
        params, cache, on_chip((1,), jnp.int32), limits, None, sampled=False, limited=False
    )
    compiled = step.compile()
    expert = 3 * 2 * config.d_model * config.d_expert
    assert compiled.memory_analysis().temp_size_in_bytes < expert  # 127 of them are 1.6 GB
    others = 2 * (config.vocab_size * config.d_model + 4 * config.d_model**2) + sum(
        2 * 2 * 1024 * config.d_model for _ in seen
    )
    # The loop over the chosen experts is counted once. The embedding's one row counts as little.
    assert compiled.cost_analysis()["bytes accessed"] < 1.5 * (others + 2 * expert)
