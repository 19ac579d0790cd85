"""The roofline, against times by hand."""

import pytest

from emo_jax.config import Config, DataConfig, TrainConfig
from emo_jax.planning import REACHED, parse_topology, step_time
from emo_jax.planning.cost import Work
from emo_jax.planning.roofline import Operations

SIZES = {"data": 1, "fsdp": 1, "expert": 8, "context": 1}
TOPOLOGY = parse_topology("h200:8")
RUN = Config(data=DataConfig(sequence_length=1000, batch_size=8), train=TrainConfig(steps=3600))


def time(work, sent, model_flops=0.0):
    return step_time(RUN, TOPOLOGY, None, SIZES, work, sent, model_flops)


def test_parts_follow_one_another_each_at_its_own_limit():
    chip = TOPOLOGY.chip
    work = {"products": Work(2 * chip.flops, chip.bandwidth), "rows": Work(0, 0.5 * chip.bandwidth)}
    found = time(work, {}, model_flops=chip.flops)
    assert found.device == {"products": 2.0, "rows": 0.5}
    assert (found.roofline, found.bound, found.mfu) == (2.5, "compute", pytest.approx(0.4))
    assert found.expected == 2.5 / REACHED
    assert found.tokens_per_second == 8000 / found.expected
    assert found.chip_hours == pytest.approx(8 * found.expected)


def test_exchanges_overlap_unless_they_are_longer():
    chip = TOPOLOGY.chip
    work = {"rows": Work(0, chip.bandwidth)}
    shorter = time(work, {("all-gather", ("expert",)): 0.5 * chip.link})
    assert (shorter.roofline, shorter.bound) == (1.0, "HBM")
    sent = {("all-gather", ("expert",)): 2 * chip.link, ("ragged-all-to-all", ("expert",)): chip.link}
    longer = time(work, sent)
    assert (longer.roofline, longer.bound) == (3.0, "interconnect")


def test_a_compiled_programs_operations_count_instead_of_formulas():
    chip = TOPOLOGY.chip
    work = {"products": Work(chip.flops, 0)}
    operations = Operations({"experts": 2.0, "attention": 1.0}, 1.0, 3 * chip.bandwidth)
    found = step_time(RUN, TOPOLOGY, None, SIZES, work, {}, 0.0, operations)
    assert (found.roofline, found.bound, found.memory) == (3.0, "HBM", 3.0)
