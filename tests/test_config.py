"""A config that cannot work is refused by the name and value of its field; every shipped one works."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from emo_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, field_names
from emo_jax.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
MODEL = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_experts": 8, "top_k": 3, "d_expert": 4, "d_dense": 5}


def make(overrides: dict) -> Config:
    """A small run that works, with dotted fields replaced."""
    config = Config(
        model=ModelConfig(vocab_size=64, **MODEL),
        data=DataConfig(sequence_length=8, batch_size=8, max_documents=4),
        optimizer=OptimizerConfig(warmup_steps=10),
        train=TrainConfig(steps=100),
    )
    config.pool.min, config.pool.max = 2, 8
    for name, value in overrides.items():
        section, field = name.split(".")
        assert hasattr(getattr(config, section), field), name
        setattr(getattr(config, section), field, value)
    return config


def test_the_config_that_these_tests_break_works():
    make({}).validate()


WRONG = [
    # Names that every message must contain come from the overrides: each field that is wrong, with its value.
    {"model.vocab_size": 0},
    {"model.d_model": 0},
    {"model.num_layers": 0},
    {"model.num_heads": 0},
    {"model.num_heads": 3},
    {"model.num_heads": 16},  # heads of width 1, which cannot rotate
    {"model.num_kv_heads": 3},
    {"model.d_expert": 0},
    {"model.num_shared_experts": -1},
    {"model.top_k": 1},  # the shared expert alone
    {"model.top_k": 9},
    {"pool.min": 1},
    {"pool.max": 9},
    {"pool.min": 7, "pool.max": 6},
    {"pool.forced": 3},
    {"pool.forced": -1},
    {"pool.start_step": -1},
    {"balance.weight": -0.1},
    {"balance.router_z_weight": -1.0},
    {"balance.local_rows": 0},
    {"data.sequence_length": 0},
    {"data.sequence_length": 1},
    {"data.batch_size": 0},
    {"data.max_documents": 0},
    {"data.heldout_documents": 0},
    {"data.heldout_fraction": 0.0},
    {"data.heldout_fraction": 1.0},
    {"data.max_megabytes": -1},
    {"data.max_document_bytes": 3},
    {"optimizer.learning_rate": 0.0},
    {"optimizer.clip_norm": 0.0},
    {"optimizer.weight_decay": -0.1},
    {"optimizer.beta1": 1.0},
    {"optimizer.beta2": -0.1},
    {"optimizer.epsilon": 0.0},
    {"optimizer.final_fraction": 1.5},
    {"optimizer.warmup_steps": 100},
    {"optimizer.warmup_steps": -1},
    {"optimizer.anneal_steps": -1},
    {"optimizer.anneal_steps": 91},
    {"pool.narrowing_steps": -1},
    {"train.continue_step": 5},
    {"train.steps": 0},
    {"train.microbatches": 0},
    {"train.microbatches": 3},
    {"train.log_every": 0},
    {"train.eval_every": -1},
    {"train.checkpoint_every": 0},
    {"train.checkpoints_kept": 0},
    {"train.seed": -1},
    {"train.logits_z_weight": -1e-5},
    {"mesh.data": 0},
    {"mesh.fsdp": -2},
]


@pytest.mark.parametrize("overrides", WRONG, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_a_wrong_value_is_refused_with_its_field_and_value(overrides):
    with pytest.raises(UserError) as raised:
        make(overrides).validate()
    for name, value in overrides.items():
        assert f"{name}={value}" in str(raised.value) or f"{name.split('.')[1]}={value!r}" in str(raised.value)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"model.experts_per_layer": (8,)}, "model.experts_per_layer has 1 entries for model.num_layers=2"),
        ({"model.experts_per_layer": (8, 0), "model.d_dense": 0}, "model.d_dense=0 must be at least 1: layer 1"),
        ({"model.num_experts": 0, "pool.kind": "none", "model.d_dense": 0}, "model.d_dense=0"),
        ({"model.num_experts": 0}, "pool.kind='document' needs experts, but this model is dense; set pool.kind=none"),
        ({"model.experts_per_layer": (8, 2)}, "model.top_k=3 asks for 2 routed experts, but a layer has only 1"),
        ({"model.norm_placement": "both"}, "model.norm_placement='both' is not one of"),
        ({"model.always_active_experts": ("0",)}, "model.always_active_experts has 1 entries for 2 mixture layers"),
        ({"model.always_active_experts": ("0", "9")}, r"always_active_experts has '9' for mixture layer 1"),
        ({"model.always_active_experts": ("0", "0 0")}, "has '0 0' for mixture layer 1: give different numbers"),
        ({"model.always_active_experts": ("0 1", "0")}, "fewer than the 2 routed experts that a token uses"),
        ({"model.always_active_experts": ("x", "0")}, "has 'x' for mixture layer 0"),
        ({"balance.scope": "local", "balance.local_rows": 3}, "balance.local_rows=3 must divide the 8 rows"),
        (
            {"balance.scope": "local", "balance.local_rows": 4, "train.microbatches": 4},
            "balance.local_rows=4 must divide the 2 rows of a microbatch",
        ),
        ({"train.microbatches": 3}, "train.microbatches=3 must divide data.batch_size=8"),
        ({"data.source": "jsonl"}, "data.source='jsonl' needs data.path"),
        ({"data.source": "mixture"}, "parts are for source='mixture'"),
        ({"data.mixture": ("a=1:installed_text",)}, "parts are for source='mixture'"),
        ({"data.source": "mixture", "data.mixture": ("a=1:text:x", "a=2:text:y")}, "names a part twice: a, a"),
        ({"data.source": "mixture", "data.mixture": ("a=0:text:x",)}, "whose weight '0' is not a positive number"),
        ({"data.source": "mixture", "data.mixture": ("a=x:text:x",)}, "whose weight 'x' is not a positive number"),
        ({"data.source": "mixture", "data.mixture": ("a=1:texts:x",)}, "source of data.mixture's 'a'='texts' is not"),
        ({"data.source": "mixture", "data.mixture": ("a=1:mixture",)}, "='mixture' is not one of"),
        ({"data.source": "mixture", "data.mixture": ("a=1:jsonl",)}, "needs a path to read"),
        ({"data.source": "mixture", "data.mixture": ("books",)}, "a part is NAME=WEIGHT:SOURCE:PATH"),
        (
            {"data.source": "mixture", "data.mixture": ("a=1:text:x",), "data.path": "y"},
            "data.path='y' is not read by a mixture",
        ),
        ({"pool.start_step": 100}, "pool.start_step=100 must lie before train.steps=100"),
        ({"train.init_from": "a", "train.continue_from": "b"}, "train.init_from and train.continue_from are both set"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh.data and mesh.fsdp are both -1"),
        ({"pool.whole_step": 5}, "pool.whole_step=5 is when documents without pools begin"),
        ({"optimizer.trainable_experts": ("0",)}, "has 1 entries for 2 mixture layers"),
        ({"optimizer.trainable_experts": ("0", "7")}, "has '7' for mixture layer 1, whose routed experts are 0..6"),
        ({"optimizer.trainable_experts": ("0", "")}, "names no expert of a layer"),
        ({"optimizer.trainable_experts": ("0", "1,2")}, "has '1,2'; an entry holds the numbers of a layer's"),
        ({"train.new_experts": 2}, "change the model of train.init_from, which is empty"),
        ({"train.new_experts": -1, "train.init_from": "a"}, "train.new_experts=-1 is negative"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused_in_words(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make(overrides).validate()


@pytest.mark.parametrize(
    "field, value, nearest",
    [
        ("model.dtype", "float16", "bfloat16"),
        ("model.remat", "fulll", "full"),
        ("pool.kind", "documents", "document"),
        ("balance.scope", "globally", "global"),
        ("data.source", "json", "jsonl"),
        ("optimizer.schedule", "cosin", "cosine"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices_and_the_nearest(field, value, nearest):
    with pytest.raises(UserError) as raised:
        make({field: value}).validate()
    assert f"{field}={value!r} is not one of" in str(raised.value)
    assert f"Did you mean {nearest!r}?" in str(raised.value)


def test_limits_themselves_are_allowed():
    for overrides in (
        {"pool.min": 2, "pool.max": 2, "pool.forced": 2},
        {"pool.min": 8},  # E, one more than the routed experts
        {"model.top_k": 8, "pool.min": 7},
        {"optimizer.schedule": "constant", "optimizer.anneal_steps": 90},
        {"optimizer.warmup_steps": 0, "train.steps": 1},
        {"optimizer.warmup_steps": 99},
        {"model.num_experts": 0, "pool.kind": "none"},
        {"pool.kind": "none", "pool.min": 1000, "pool.start_step": 1000},  # unused
        {"pool.start_step": 99, "pool.narrowing_steps": 1000},
        {"balance.scope": "local", "balance.local_rows": 8},
        {"mesh.data": 1, "mesh.fsdp": -1},
    ):
        make(overrides).validate()


@pytest.mark.parametrize(
    "section, name, hint",
    [
        ("model", "num_expert", "--config.model.num_experts?"),
        ("optimizer", "lerning_rate", "--config.optimizer.learning_rate?"),
        ("train", "sequence_length", "--config.data.sequence_length?"),  # right field, wrong section
    ],
)
def test_an_unknown_field_in_json_is_refused_with_the_nearest_name(section, name, hint):
    with pytest.raises(UserError) as raised:
        Config.from_json(json.dumps({section: {name: 1}}))
    assert f"{section}.{name}" in str(raised.value)
    assert hint in str(raised.value)


def test_an_unknown_section_in_json_is_refused():
    with pytest.raises(UserError, match=r"'wandb'\. See emo_jax/config\.py"):
        Config.from_json('{"wandb": {}}')


def test_fields_missing_from_json_keep_their_defaults():
    assert Config.from_json('{"train": {"steps": 7}}') == Config(train=TrainConfig(steps=7))


def test_every_field_survives_json():
    """Each field differs from its default, so that one left out would show."""
    config = Config()
    for name in field_names():
        section, field = name.split(".")
        part = getattr(config, section)
        value = getattr(part, field)
        if isinstance(value, bool):
            value = not value
        elif isinstance(value, tuple):
            value = (4, 0)
        else:
            value = value + "x" if isinstance(value, str) else value + 1
        setattr(part, field, value)
    again = Config.from_json(config.to_json())
    assert again == config
    assert isinstance(again.model.experts_per_layer, tuple)
    assert json.loads(config.to_json()) == json.loads(json.dumps(dataclasses.asdict(config)))


def shipped(path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__, "a config file starts with what it is"
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_works_and_survives_json(path):
    config = shipped(path)
    if config.data.source != "installed_text":
        with pytest.raises(UserError, match=r"data\.path"):
            config.validate()  # whose text it is, only its user knows
        config.data.path = "texts/*.jsonl.gz"
    config.validate()
    assert Config.from_json(config.to_json()) == config


def test_the_standard_mixture_differs_from_emo_in_its_pools_alone():
    emo, standard = (shipped(path) for path in CONFIGS if path.stem in ("emo_1b14b", "stdmoe_1b14b"))
    standard.pool = emo.pool
    assert standard == emo


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["top level", "[]"]),
        ('{"train": 3}', ["train", "3"]),
        ('{"train": {"steps": "x"}}', ["train.steps", "'x'", "int"]),
        ('{"pool": {"knd": "none"}}', ["pool.knd", "pool.kind"]),
    ],
)
def test_json_that_is_no_config_is_a_mistake_a_person_can_read(text, words):
    with pytest.raises(UserError) as error:
        Config.from_json(text)
    for word in words:
        assert word in str(error.value)
