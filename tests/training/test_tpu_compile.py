"""The released geometry, compiled ahead of time for real TPU topologies; no chip is needed."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from emo_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig
from emo_jax.model import flops_per_token
from emo_jax.parallel import MeshConfig
from emo_jax.parallel.compiled import products
from emo_jax.planning import compile_step as plan_step
from emo_jax.planning import parse_topology, unplaced
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


SPLIT = {"split_experts": 64, "split_top_k": 16}
LLAMA = {"vocab_size": 32_000, "d_model": 4096, "num_heads": 32, "d_dense": 11_008, "remat": "full"}
GPT2_XL = {
    "vocab_size": 50_257,
    "d_model": 1600,
    "num_heads": 25,
    "d_dense": 6400,
    "positions": "learned",
    "max_positions": 1024,
    "norm": "layer",
    "feed_forward": "gelu_tanh",
    "biases": True,
    "tied_embeddings": True,
}
BERT = {
    "vocab_size": 30_522,
    "d_model": 768,
    "num_heads": 12,
    "d_dense": 3072,
    "positions": "learned",
    "max_positions": 512,
    "token_types": 2,
    "causal": False,
    "norm": "layer",
    "norm_placement": "sum",
    "feed_forward": "gelu",
    "biases": True,
    "labels": ("no", "yes"),
}


def dense(model: dict, length: int, rank: int = 0, mesh: MeshConfig | None = None) -> Config:
    """Fine-tuning of a published dense model."""
    run = Config(
        model=ModelConfig(num_experts=0, **model),
        pool=PoolConfig(kind="none"),
        data=DataConfig(labels=model.get("labels", ()), sequence_length=length, batch_size=4),
        optimizer=OptimizerConfig(lora_rank=rank),
        mesh=mesh or MeshConfig(data=1, fsdp=-1),
    )
    run = unplaced(run)
    run.validate()
    return run


@pytest.mark.parametrize("rank", [0, 8])
def test_a_split_layer_of_llama_costs_what_a_dense_one_does(tmp_path, rank):
    """As XLA has optimised the step and planned its memory; machine code would take it minutes."""
    found = []
    for more in ({}, SPLIT | {"split_layers": (1,)}):
        run = dense(LLAMA | {"num_layers": 2} | more, 2048, rank, MeshConfig(data=1, fsdp=2, expert=2))
        found.append(plan_step(run, parse_topology("v5p:2x2x1"), print, tmp_path))
    whole, split = found
    assert whole.dense < split.dense < 1.01 * whole.dense
    assert split.temporaries < 1.05 * whole.temporaries
    # Experts' keys are made of weights as they rest; neurons in blocks stay with their tokens.
    assert sum(split.sent.values()) < 1.005 * sum(whole.sent.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "length", "topology"), [(GPT2_XL, 1024, "v5p:2x2x1"), (BERT, 512, "v6e:2x2")], ids=["gpt2-xl", "bert"]
)
def test_a_split_layer_of_older_models_compiles_with_attention_kernels(model, length, topology):
    found = []
    for more in ({}, SPLIT | {"split_layers": (0,)}):
        hlo = compile_step(dense(model | {"num_layers": 1} | more, length), topology).as_text()
        assert hlo.count("tpu_custom_call") == 2, "attention, forward and backward"
        found.append(products(hlo).dense)
    assert found[0] < found[1] < 1.01 * found[0]


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
