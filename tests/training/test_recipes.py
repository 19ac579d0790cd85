"""Recipes as a user types them, at tiny scale: anneal, continue, start from weights, pools that come later."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import emo_jax
from emo_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PoolConfig,
    TrainConfig,
)
from emo_jax.errors import UserError
from emo_jax.model.routing import draw_pools
from emo_jax.parallel import make_mesh
from emo_jax.training import train
from emo_jax.training.checkpoints import check_same_run
from emo_jax.training.optimizer import learning_rate
from emo_jax.training.start import continue_run
from emo_jax.training.step import abstract_state
from emo_jax.training.weights import load_parameters
from tests.interop.goldens import GOLDEN, needs_golden, relative

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORDS = ("simmer", "the", "onions", "in", "butter", "keel", "wind", "whereas", "party", "shall")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 30))) for _ in range(120)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(corpus, pool="none", **train_fields) -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, num_heads=2, num_experts=8, top_k=3, d_expert=8, dtype="float32"
        ),
        pool=PoolConfig(kind=pool, min=2, max=4),
        balance=BalanceConfig(weight=0.1),
        data=DataConfig(source="jsonl", path=str(corpus), sequence_length=32, batch_size=4, max_documents=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(**{"steps": 8, "eval_every": 0, "checkpoint_every": 4} | train_fields),
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """What each step computed: without the clock and what evaluations add."""
    made = [{k: v for k, v in line.items() if k not in ("timing", "heldout")} for line in lines(folder)]
    for line in made:
        line["routing"].pop("expert_load", None)
    return made


@pytest.fixture(scope="module")
def standard(tmp_path_factory, corpus):
    """A finished run of a standard mixture: 8 steps."""
    folder = tmp_path_factory.mktemp("standard")
    train(config(corpus), folder, log=lambda text: None)
    return folder


def equal(first, second):
    for ours, wanted in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_a_finished_run_is_lengthened_by_its_anneal_and_equals_one_planned_so(standard, corpus, tmp_path):
    shutil.copytree(standard, tmp_path / "lengthened")
    longer = config(corpus, steps=12)
    longer.optimizer.anneal_steps = 4
    for folder in ("lengthened", "planned"):
        train(longer, tmp_path / folder, log=lambda text: None)
    assert numbers(tmp_path / "lengthened") == numbers(tmp_path / "planned")
    equal(load_parameters(tmp_path / "lengthened")[1], load_parameters(tmp_path / "planned")[1])
    rates = [line["learning_rate"] for line in lines(tmp_path / "planned")]
    np.testing.assert_allclose(rates[8:], 1e-3 * (1 - np.arange(4) / 4), rtol=1e-5)


def test_a_standard_mixture_is_annealed_into_emo_in_a_folder_of_its_own(standard, corpus, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in standard.rglob("*") if path.name != ".lock")
    annealed = config(corpus, pool="document", steps=12, continue_from=str(standard))
    annealed.optimizer.anneal_steps, annealed.pool.start_step = 4, 8
    said = []
    train(annealed, tmp_path / "emo", log=said.append)
    assert f"Continuing {standard} from its checkpoint of step 8." in said
    assert before == sorted((path, path.stat().st_mtime_ns) for path in standard.rglob("*") if path.name != ".lock")
    assert numbers(tmp_path / "emo")[:8] == numbers(standard)
    sizes = [line["routing"]["pool_size_max"][0] for line in lines(tmp_path / "emo")]
    assert sizes[:8] == [7] * 8 and max(sizes[8:]) <= 4
    assert lines(tmp_path / "emo")[-1]["learning_rate"] < 1e-3
    # It resumes by itself, even when its origin has gone.
    annealed.train.continue_from = str(tmp_path / "gone")
    shutil.rmtree(tmp_path / "emo" / "checkpoints" / "12")
    text = (tmp_path / "emo" / "config.json").read_text().replace(str(standard), str(tmp_path / "gone"))
    (tmp_path / "emo" / "config.json").write_text(text)
    ended = load_parameters(tmp_path / "emo")[2]
    assert ended == 8
    assert train(annealed, tmp_path / "emo", log=lambda text: None).step == 12


def test_an_earlier_checkpoint_gives_the_run_that_was_not_changed(standard, corpus, tmp_path):
    train(config(corpus, continue_from=str(standard), continue_step=4), tmp_path, log=lambda text: None)
    assert numbers(tmp_path) == numbers(standard)
    equal(load_parameters(tmp_path)[1], load_parameters(standard)[1])


def test_a_copy_that_was_interrupted_is_made_again_and_a_strange_folder_is_left_alone(standard, corpus, tmp_path):
    run = config(corpus, continue_from=str(standard))
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8" / "half").touch()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json; give an empty --workdir"):
        train(run, tmp_path, log=lambda text: None)
    assert (tmp_path / "checkpoints" / "8" / "half").exists()
    (tmp_path / ".incoming" / "data").mkdir(parents=True)  # what a copy leaves until it is complete
    continue_run(run, tmp_path, log=lambda text: None)
    assert not (tmp_path / ".incoming").exists() and not (tmp_path / "checkpoints" / "8" / "half").exists()
    assert Config.from_json((tmp_path / "config.json").read_text()) == run
    equal(load_parameters(tmp_path)[1], load_parameters(standard)[1])
    for file in (standard / "data").rglob("*"):
        assert (tmp_path / "data" / file.relative_to(standard / "data")).samefile(file)


def test_a_run_that_continues_another_reads_the_same_tokens(standard, corpus, tmp_path):
    run = config(corpus, continue_from=str(standard))
    run.data.cache_dir = str(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"has its tokens in data\.cache_dir='', this run asks for"):
        train(run, tmp_path / "run", log=lambda text: None)
    run = config(corpus, continue_from=str(standard), continue_step=5)
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; it has \[4, 8\]"):
        train(run, tmp_path / "run", log=lambda text: None)
    run = config(corpus, continue_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is not a run directory"):
        train(run, tmp_path / "run", log=lambda text: None)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train.steps": 12}, "set train.steps=12 and optimizer.anneal_steps=4"),
        ({"pool.kind": "document", "pool.start_step": 7}, "set pool.start_step to 8 or more"),
        ({"optimizer.learning_rate": 1e-3}, "optimizer.learning_rate=0.01, now it is 0.001"),
        ({"data.batch_size": 8}, "data.batch_size=4, now it is 8"),
    ],
)
@pytest.mark.parametrize("where", ["in place", "from another folder"])
def test_what_would_change_steps_already_done_is_refused(standard, corpus, tmp_path, change, words, where):
    run = config(corpus)
    for name, value in change.items():
        section, field = name.split(".")
        setattr(getattr(run, section), field, value)
    if where == "from another folder":
        run.train.continue_from = str(standard)
    with pytest.raises(UserError, match=re.escape(words)):
        train(run, standard if where == "in place" else tmp_path, log=lambda text: None)


def test_a_run_starts_from_a_runs_weights_and_tokenizer_with_everything_else_fresh(standard, corpus, tmp_path):
    shutil.copytree(standard, tmp_path / "origin")
    run = config(corpus, pool="document", init_from=str(tmp_path / "origin"), steps=3)
    run.optimizer.learning_rate, run.optimizer.weight_decay, run.pool.narrowing_steps = 1e-12, 0.0, 2
    train(run, tmp_path / "run", log=lambda text: None)
    first = lines(tmp_path / "run")[0]
    assert first["step"] == 1 and first["learning_rate"] == 0
    assert first["cross_entropy"] < lines(standard)[0]["cross_entropy"] - 0.05  # it has learnt something already
    largest, smallest = (
        [line["routing"][f"pool_size_{end}"][0] for line in lines(tmp_path / "run")] for end in ("max", "min")
    )
    assert largest[0] == smallest[0] == 7 and 4 <= smallest[1] <= largest[1] <= 6  # halfway from 7 to 2..4
    assert 2 <= smallest[2] <= largest[2] <= 4
    leaves = (jax.tree.leaves(load_parameters(folder)[1]) for folder in (tmp_path / "run", standard))
    for ours, wanted in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-9)
    tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "run", standard)]
    assert tokenizers[0]["model"]["vocab"] == tokenizers[1]["model"]["vocab"]
    # Its own checkpoint is all it needs to go on.
    shutil.rmtree(tmp_path / "origin")
    assert train(run, tmp_path / "run", log=lambda text: None).step == 3


@needs_golden
def test_a_run_starts_from_released_weights(corpus, tmp_path):
    folder = GOLDEN / "emo_tiny"
    run = config(corpus, init_from=str(folder), steps=4)
    run.model = emo_jax.load(folder).config
    with pytest.raises(UserError, match="name the one its weights were trained with"):
        train(run, tmp_path / "none", log=lambda text: None)
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())[:250]])}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run.data.tokenizer = str(tmp_path / "tokenizer.json")
    assert train(run, tmp_path / "run", log=lambda text: None).step == 4
    released, ours = emo_jax.load(folder).params, load_parameters(tmp_path / "run")[1]
    # Its first step has a learning rate of 0, so three small steps lie between them.
    assert relative(ours["head"], released["head"]) < 0.5


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"model.d_expert": 16},
            "a model with d_expert=8, this run's model has 16: set --config.model.d_expert=8",
        ),
        (
            {"model.num_experts": 6},
            "holds a model with num_experts=8, this run's model has 6: set --config.model.num_experts=8",
        ),
        ({"model.experts_per_layer": (6,)}, "num_experts=8, this run's model has 6"),
        ({"data.end_of_text": "<|end|>"}, "data.end_of_text='<|end|>' is not a token of"),
        ({"model.rope_theta": 1e4}, "rope_theta=500000.0"),
        ({"train.init_from": "nowhere"}, "train.init_from='nowhere' has no config.json"),
    ],
)
def test_weights_of_another_model_are_refused_before_any_work(standard, corpus, tmp_path, change, words):
    run = config(corpus, init_from=str(standard))
    for name, value in change.items():
        section, field = name.split(".")
        setattr(getattr(run, section), field, value)
    with pytest.raises(UserError, match=re.escape(words)):
        train(run, tmp_path / "run", log=lambda text: None)
    assert not (tmp_path / "run" / "data").exists()


def test_weights_without_a_tokenizer_or_with_another_one_are_refused(standard, corpus, tmp_path):
    shutil.copytree(standard, tmp_path / "origin")
    run = config(corpus, init_from=str(tmp_path / "origin"))
    tokenizer = json.loads((standard / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab["another"] = vocab.pop(last)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "other.json").write_text(json.dumps(tokenizer))
    run.data.tokenizer = str(tmp_path / "other.json")
    with pytest.raises(UserError, match="has another vocabulary than"):
        train(run, tmp_path / "run", log=lambda text: None)
    (tmp_path / "origin" / "tokenizer.json").unlink()
    run.data.tokenizer = ""
    with pytest.raises(UserError, match="name the one its weights were trained with"):
        train(run, tmp_path / "run", log=lambda text: None)


def test_a_narrowing_range_goes_linearly_from_all_experts_to_its_ends():
    pool = PoolConfig(kind="document", min=8, max=32, start_step=100, narrowing_steps=50)
    shape = {"rows": 40, "layers": 2, "documents": 5, "experts": 127}
    for step in (0, 99, 100, 101, 120, 149, 150, 500):
        size_BLG = np.asarray(draw_pools(pool, 0, np.int32(step), **shape).size_BLG)
        done = np.clip((step - 100) / 50, 0, 1)
        low, high = (int(np.round(127 + done * (end - 127))) for end in (8, 32))
        assert low <= size_BLG.min() and size_BLG.max() <= high
        if low < high:
            assert size_BLG.min() < low + 0.1 * (high - low) + 1 and size_BLG.max() > high - 0.1 * (high - low) - 1
    plain = PoolConfig(kind="document", min=8, max=32)
    for name, ours in draw_pools(pool, 0, np.int32(500), **shape)._asdict().items():
        np.testing.assert_array_equal(ours, getattr(draw_pools(plain, 0, np.int32(500), **shape), name))


def documented() -> list:
    """(config file, overrides) of every recipe in the docstrings of configs/."""
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        text = path.read_text().split('"""')[1]
        for line in re.sub(r"\\+\n", " ", text).splitlines():
            overrides = re.findall(r"--config\.(\S+?)=(\S+)", line)
            if overrides:
                found.append((path, overrides))
    return found


def named(recipes):
    return [pytest.param(p, o, id=f"{p.stem}: {' '.join('='.join(pair) for pair in o)[:60]}") for p, o in recipes]


def typed(path, overrides) -> Config:
    """The config as the command line makes it."""
    values = flags.FlagValues()
    arguments = ["test", f"--config={path}", *(f"--config.{name}={value}" for name, value in overrides)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    made = values.config
    made.data.path = made.data.path or "unused"
    return made


@pytest.mark.parametrize("path, overrides", named(documented()))
def test_documented_overrides_make_a_valid_run(path, overrides):
    typed(path, overrides).validate()


@pytest.mark.parametrize("path, overrides", named(r for r in documented() if "anneal_steps" in str(r[1])))
def test_a_documented_anneal_goes_on_from_the_released_run_with_the_same_state(path, overrides):
    released, annealed = typed(path, []), typed(path, overrides)
    check_same_run(released, annealed, 238_419, "the released run", ignored=("train.continue_from",))
    mesh = make_mesh(MeshConfig(), released.data.batch_size, jax.devices()[:1])
    states = [abstract_state(run, mesh) for run in (released, annealed)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert jax.tree.leaves(states[0]) == jax.tree.leaves(states[1])
    rate = learning_rate(annealed.optimizer, annealed.train.steps)
    before = 4e-4 + 3.6e-3 * (1 + np.cos(np.pi * (238_418 - 2000) / (238_419 - 2000))) / 2
    for step, wanted in ((238_418, before), (238_419, 4e-4), (250_338, 4e-4 / 11_920)):
        np.testing.assert_allclose(float(rate(step)), wanted, rtol=1e-5, atol=1e-7 * 4e-4, err_msg=str(step))  # float32


def test_every_config_is_documented_with_its_command():
    for path in CONFIGS.glob("*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert f"--config=configs/{path.name}" in module.__doc__
