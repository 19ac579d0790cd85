"""The step compiled for chips that are not there: what its compiler says beside the formulas, and its refusals."""

import dataclasses

import pytest

from emo_jax.config import BalanceConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, PoolConfig
from emo_jax.errors import UserError
from emo_jax.planning import compile_step, estimate, parse_topology, plan_text, unplaced
from emo_jax.planning.compiler import _out_of_memory
from emo_jax.planning.search import Planner

pytest.importorskip("libtpu", reason="compiles for TPUs need libtpu: pip install 'emo_jax[tpu]'")
SIZES = {"data": 1, "fsdp": 2, "expert": 2, "context": 1}


def run() -> Config:
    return unplaced(
        Config(
            model=ModelConfig(
                vocab_size=8192,
                d_model=512,
                num_layers=2,
                num_heads=4,
                num_experts=17,
                top_k=5,
                d_expert=512,
                remat="full",
            ),
            balance=BalanceConfig(scope="microbatch"),
            data=DataConfig(source="installed_text", sequence_length=2048, batch_size=16),
            mesh=MeshConfig(data=1, fsdp=2, expert=2, exchange="all_to_all", chunks=2),
        )
    )


def test_formulas_are_near_what_the_compiler_plans_and_a_second_time_is_free(tmp_path):
    made, topology, told = run(), parse_topology("v5p:2x2x1"), []
    found = compile_step(made, topology, told.append, tmp_path)
    cost = estimate(made, SIZES)
    assert cost.memory.arguments == pytest.approx(found.arguments, rel=0.02)
    assert cost.memory.total == pytest.approx(found.total, rel=0.2)  # small arrays leave large gaps
    assert cost.flops.dense == pytest.approx(found.dense, rel=0.03)
    assert cost.flops.grouped == pytest.approx(found.grouped, rel=1e-6)
    rows = ("ragged-all-to-all", ("expert",))
    assert cost.sent[rows] == pytest.approx(found.sent[rows])
    assert sum(buffer.size for buffer in found.largest) <= found.temporaries
    assert any(buffer.name.startswith("experts") for buffer in found.largest)
    assert {"experts", "attention", "loss"} <= set(found.busy)
    again = compile_step(made, topology, told.append, tmp_path)
    assert again == found
    assert "compiled before" in told[-1]
    text = plan_text(Planner(topology).layout(made), topology, found)
    assert "fits" in text and "roofline, bound by" in text


DECODER = {"positions": "learned", "max_positions": 1024, "tied_embeddings": True, "feed_forward": "gelu_tanh"}
ENCODER = {"causal": False, "norm_placement": "sum", "feed_forward": "gelu", "labels": ("no", "yes"), "remat": "full"}
SPLIT = {"split_layers": (1,), "split_experts": 32, "split_top_k": 8}


@pytest.mark.parametrize(
    ("model", "rank", "near"),
    [(DECODER | SPLIT, 0, 0.1), (ENCODER, 0, 0.2), (SPLIT, 8, 0.25)],
    ids=["a decoder that is split", "a classifier", "lora"],
)
def test_formulas_of_dense_models_are_near_what_the_compiler_plans(tmp_path, model, rank, near):
    shape = {"vocab_size": 8192, "d_model": 1024, "num_layers": 2, "num_heads": 16, "num_experts": 0, "d_dense": 4096}
    more = {"norm": "layer", "biases": True} if "feed_forward" in model else {}
    made = unplaced(
        Config(
            model=ModelConfig(**shape | more | model),
            pool=PoolConfig(kind="none"),
            data=DataConfig(labels=model.get("labels", ()), sequence_length=512, batch_size=32),
            optimizer=OptimizerConfig(lora_rank=rank),
            mesh=MeshConfig(data=1, fsdp=4),
        )
    )
    made.validate()
    found = compile_step(made, parse_topology("v5p:2x2x1"), lambda text: None, tmp_path)
    cost = estimate(made, {"data": 1, "fsdp": 4, "expert": 1, "context": 1})
    assert cost.memory.arguments == pytest.approx(found.arguments, rel=0.02)
    assert cost.memory.total == pytest.approx(found.total, rel=near)
    assert cost.flops.dense == pytest.approx(found.dense, rel=0.002)
    assert sum(cost.sent.values()) == pytest.approx(sum(found.sent.values()), rel=0.05)


def test_a_step_that_does_not_fit_is_planned_too(tmp_path):
    made, topology = run(), parse_topology("v5e:2x2")
    made.model = dataclasses.replace(made.model, num_layers=1)
    made.data = dataclasses.replace(made.data, batch_size=16 * 128)
    found = compile_step(made, topology, lambda text: None, tmp_path)
    assert found.total > topology.chip.memory
    text = plan_text(Planner(topology).layout(made), topology, found)
    assert "DOES NOT FIT" in text and "too much" in text


def test_a_compiler_that_gave_up_is_understood():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (256.00G) exceeds available HBM (15.75G). HLO module: jit_train_step."
    )
    found = _out_of_memory(message, 1.0)
    assert (found.needed, found.limit, found.total) == (256 * 2**30, 15.75 * 2**30, 0)
    topology = parse_topology("v5e:2x2")
    assert "DOES NOT FIT: the compiler needs 274.88 GB" in plan_text(Planner(topology).layout(run()), topology, found)


def test_a_compiler_that_cannot_says_so(tmp_path):
    made = run()
    made.model = dataclasses.replace(made.model, d_model=520)  # heads of 130 numbers
    with pytest.raises(UserError, match="The TPU compiler failed: "):
        compile_step(made, parse_topology("v5p:2x2x1")._replace(name="v5p:2x2x2"), lambda text: None, tmp_path)
