"""Layouts that a search offers work, fit, and can be pasted."""

import dataclasses

import pytest

from emo_jax.config import Config
from emo_jax.planning import Planner, parse_topology, search_text
from emo_jax.planning.search import MARGIN, smallest_topology
from tests.planning.test_cost import SPLIT, on, published, run


@pytest.fixture(scope="module")
def planner():
    return Planner(parse_topology("h200:8"))


@pytest.fixture(scope="module")
def layouts(planner):
    return planner.layouts(run(), lambda text: None)


def pasted(base: Config, flags: str) -> Config:
    """The config with flags such as `--config.mesh.fsdp=8` applied, as absl does."""
    made = Config.from_json(base.to_json())
    for flag in flags.split():
        name, value = flag.removeprefix("--config.").split("=")
        section, field = name.split(".")
        kind = type(getattr(getattr(made, section), field))
        setattr(getattr(made, section), field, kind(value))
    return made


def test_every_layout_is_a_run_that_trains(planner, layouts):
    assert len(layouts) > 100
    for one in layouts[:: len(layouts) // 40]:
        made = pasted(run(), one.flags(run()))
        made.validate()
        again = planner.layout(made)
        assert again.sizes == one.sizes
        assert again.cost.memory.total == one.cost.memory.total


def test_the_fastest_that_fit_come_first(planner, layouts):
    assert all(one.fits(planner.topology, MARGIN) for one in layouts)
    times = [one.time.roofline for one in layouts]
    assert times == sorted(times)


def test_the_nearest_that_fits_changes_few_fields(planner):
    made = on(run(), {"data": 8, "fsdp": 1})
    assert planner.nearest(made).flags(made) == "", "the run as it is fits"
    full = dataclasses.replace(made, data=dataclasses.replace(made.data, batch_size=64, sequence_length=2**21))
    assert not planner.layout(full).fits(planner.topology)
    nearest = planner.nearest(full)
    assert nearest.fits(planner.topology)
    assert nearest.flags(full).count("--config.") == 1


def test_more_chips_where_nothing_fits():
    large = run(num_experts=2049, d_model=4096, d_expert=4096, num_layers=8)
    large = dataclasses.replace(large, data=dataclasses.replace(large.data, batch_size=1024))
    found = smallest_topology(large, "h100")
    assert found is not None and found.chips > 8
    planner = Planner(parse_topology(f"h100:{found.chips // 2}"))
    assert not any(one.fits(planner.topology, MARGIN) for one in planner.leanest(large))


def test_experts_of_a_split_layer_are_not_spread(planner):
    made = published("gpt2", {"lora_rank": 8}, **SPLIT)
    made.data.batch_size = 8
    found = planner.layouts(made, lambda text: None)
    assert found and all(one.sizes["expert"] == 1 and one.exchange == "none" for one in found)


def test_the_table_names_flags(planner, layouts):
    text = search_text([(one, None) for one in layouts], planner.topology, run(), 3)
    assert text.count("--config.") >= 3
    assert "tokens/s" in text
