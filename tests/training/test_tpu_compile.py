"""The released geometry, compiled ahead of time for real TPU topologies; no chip is needed."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from emo_jax.model import flops_per_token
from emo_jax.parallel import MeshConfig
from emo_jax.training.step import abstract_batch, abstract_state, make_train_step, run_mesh

pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def released(layers: int, rows: int, **model):
    """configs/emo_1b14b.py with so many layers and rows, other fields of the model replaced."""
    spec = importlib.util.spec_from_file_location("emo_1b14b", CONFIGS / "emo_1b14b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.get_config()
    run.model = dataclasses.replace(run.model, num_layers=layers, **model)
    run.data.batch_size, run.data.path, run.train.microbatches = rows, "unused", 1
    run.mesh = MeshConfig(data=1, fsdp=-1)
    run.validate()
    return run


def compile_step(run, topology: str):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = run_mesh(run, devices)
    step = make_train_step(run, mesh)
    return step.lower(abstract_state(run, mesh), abstract_batch(run, mesh)).compile()


def test_a_layer_of_the_released_model_compiles_with_no_more_flops_than_its_formula():
    # A small vocabulary: a large one goes through a scan, whose body the cost analysis counts once.
    run = released(layers=1, rows=4, remat="none", vocab_size=2048)
    run.data.sequence_length = 1024
    compiled = compile_step(run, "v5p:2x2x1")
    hlo = compiled.as_text()
    # Grouped matrix products as Mosaic kernels: a dense lowering would cost 127 times as much.
    assert "tpu_custom_call" in hlo
    assert not re.search(r"ragged[_-]dot\(", hlo)
    tokens_a_chip = run.data.sequence_length
    wanted = flops_per_token(run.model, run.data.sequence_length) * tokens_a_chip
    flops = compiled.cost_analysis()["flops"]
    assert 0.9 * wanted < flops < 1.05 * wanted


def test_documents_of_a_row_cost_nothing():
    """FLOPs as the program is lowered: a document more adds a column to the sums of router probabilities."""
    found = []
    for documents in (8, 64):
        run = released(layers=1, rows=4, vocab_size=2048)
        run.data.max_documents = documents
        mesh = run_mesh(run, jax.devices()[:4])
        lowered = make_train_step(run, mesh).lower(abstract_state(run, mesh), abstract_batch(run, mesh))
        found.append(lowered.cost_analysis()["flops"])
    tokens = run.data.sequence_length * run.data.batch_size
    assert 0 < found[1] - found[0] < 1e-2 * flops_per_token(run.model, run.data.sequence_length) * tokens


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_four_layers_compile_with_accumulation_and_full_remat(topology):
    run = released(layers=4, rows=8)
    run.train.microbatches, run.balance.scope = 2, "global"
    memory = compile_step(run, topology).memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 2**30


@pytest.mark.slow
def test_a_frozen_layer_keeps_moments_of_its_trained_experts_alone():
    run = released(layers=1, rows=4, remat="none", vocab_size=2048)
    run.data.sequence_length = 1024
    whole = compile_step(run, "v5p:2x2x1").memory_analysis().argument_size_in_bytes
    run.optimizer.trainable_experts = (" ".join(map(str, range(31))),)
    part = compile_step(run, "v5p:2x2x1").memory_analysis().argument_size_in_bytes
    expert = 3 * run.model.d_model * run.model.d_expert + run.model.d_model
    # Two float32 moments less for each of the other 96 experts, on each of the chips that share the layer.
    assert whole - part > 0.95 * 2 * 4 * 96 * expert / 4
