"""Router statistics of a released layer, compiled ahead of time for a real TPU topology; no chip is needed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from emo_jax.kernels.experts import op
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.modularity.calibration import _layer_functions

pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")


@pytest.mark.slow
def test_statistics_of_a_released_layer_compile_with_grouped_products(monkeypatch):
    monkeypatch.setattr(op, "default_implementation", lambda platform: "ragged")  # what a TPU backend would choose
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    config = ModelConfig(vocab_size=2048, num_layers=1)
    measure, advance = _layer_functions(json.dumps(dataclasses.asdict(config)), config.num_experts)

    def on_chip(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

    state = jax.tree.map(on_chip, abstract_parameters(config)["layers"]["00"])
    x, ids = (
        on_chip(jax.ShapeDtypeStruct((1, 1024, *rest), t)) for rest, t in (((2048,), jnp.bfloat16), ((), jnp.int32))
    )
    asked = on_chip(jax.ShapeDtypeStruct((1, 1024), bool))
    expert = 2 * 3 * config.d_model * config.d_expert
    shared = 2 * 1024 * (4 * config.d_model**2 + config.d_model * 127) + 4 * 1024**2 * config.d_model + 1024 * expert
    for function, arguments, passes in (
        (measure, (state, x, ids, ids, asked), 2),
        (advance, (state, x, ids, ids, None), 1),
    ):
        compiled = function.lower(*arguments).compile()
        assert "tpu_custom_call" in compiled.as_text()
        # A dense lowering of the experts would cost 127 / 7 times as much.
        assert compiled.cost_analysis()["flops"] < 1.3 * (shared + passes * 7 * 1024 * expert)
