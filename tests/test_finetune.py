"""`emo_jax.finetune` as its user runs it: what is trained, what is not, and what is learnt from."""

import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import emo_jax
from emo_jax.config import Config
from emo_jax.data import examples_by_domain
from emo_jax.errors import UserError
from emo_jax.modularity import Subset, SubsetLosses, fingerprint
from emo_jax.training import train
from emo_jax.training.conversion import export_folder
from emo_jax.training.weights import load_parameters
from tests.interop.goldens import GOLDEN, needs_golden
from tests.mains import run_main, small_run

RNG = np.random.default_rng(0)
WORDS = ["simmer", "onions", "butter", "stock", "salt", "pepper", "keel", "wind", "mast"]
KEPT = ((0, 2, 5), (1, 3, 4, 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in `run`, a subset of it, and examples of a task."""
    path = tmp_path_factory.mktemp("finetune")
    lines = [json.dumps({"text": " ".join(RNG.choice(WORDS, 12))}) for _ in range(60)]
    (path / "texts.jsonl").write_text("\n".join(lines))
    train(small_run(path / "texts.jsonl", steps=6), path / "run", log=lambda text: None)
    model = emo_jax.load(path / "run")
    (path / "subset.json").write_text(Subset(KEPT, fingerprint(model.config, model.params)).to_json())
    examples = [
        {"prompt": f"{WORDS[i % 9]} {i}:", "answer": f" {WORDS[(i + 1) % 9]}", "domain": "next"} for i in range(120)
    ]
    (path / "task.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return path


def finetune(folder, workdir, *flags):
    own = [f"--model={folder / 'run'}", f"--workdir={workdir}", f"--data={folder / 'task.jsonl'}"]
    own += ["--config.data.sequence_length=24", "--config.data.batch_size=16"]
    own += ["--config.optimizer.learning_rate=0.01", "--config.optimizer.weight_decay=0.1"]
    return run_main("finetune", *own, *flags)


def by_name(params):
    paths = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}


def test_a_whole_model_learns_the_answers_and_a_second_command_has_nothing_left_to_do(folder, tmp_path):
    done = finetune(folder, tmp_path / "tuned", "--epochs=2")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"] - 0.2
    assert f"next  {results['before']['loss']:.3f}  {results['after']['loss']:.3f}" in done.stdout
    config = Config.from_json((tmp_path / "tuned" / "config.json").read_text())
    examples = 120 - len(np.load(tmp_path / "tuned" / "data" / "heldout_domains.npy"))
    assert config.train.steps == -(-2 * examples // 16) and config.optimizer.warmup_steps == config.train.steps // 10
    # Only answers and their end tokens are learnt.
    first = json.loads((tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()[0])
    tokenizer_tokens = first["loss_tokens"]
    assert 16 * 2 <= tokenizer_tokens <= 16 * 9
    again = finetune(folder, tmp_path / "tuned", "--epochs=2")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "tuned" / "finetune.json").read_text()) == results
    export_folder(tmp_path / "tuned", tmp_path / "published")  # for texts as long as the run's that it started from
    published = json.loads((tmp_path / "published" / "config.json").read_text())
    assert published["max_position_embeddings"] == 32 > config.data.sequence_length


def test_rows_are_as_long_as_the_longest_text_needs_also_where_texts_are_labelled(folder, tmp_path):
    lines = [{"text": f"{WORDS[i % 9]} " * (1 + i % 30), "label": WORDS[i % 9]} for i in range(120)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [f"--model={folder / 'run'}", f"--data={tmp_path / 'labelled.jsonl'}", "--classify"]
    flags += [f"--workdir={tmp_path / 'tuned'}", "--config.data.batch_size=16"]
    done = run_main("finetune", *flags)
    assert done.returncode == 0, done.stderr
    longest = int(np.diff(np.load(tmp_path / "tuned" / "data" / "train_offsets.npy")).max())
    length = -(-longest // 128) * 128
    assert length < 1024 and f"of {length} tokens, best_fit" in done.stdout
    again = run_main("finetune", *flags)
    assert again.returncode == 0, again.stderr


def test_a_subset_is_trained_as_the_model_cut_to_it(folder, tmp_path):
    done = finetune(folder, tmp_path / "tuned", f"--subset={folder / 'subset.json'}")
    assert done.returncode == 0, done.stderr
    tuned = emo_jax.load(tmp_path / "tuned")
    assert tuned.config.layer_experts == (4, 5)
    cut = by_name(emo_jax.load(folder / "run").cut(Subset.load(folder / "subset.json")).params)
    new = by_name(tuned.params)
    assert {name: leaf.shape for name, leaf in cut.items()} == {name: leaf.shape for name, leaf in new.items()}
    assert all((cut[name] != new[name]).any() for name in cut)
    assert all(np.abs(cut[name] - new[name]).max() < 0.1 for name in cut)  # steps away, not drawn anew
    assert Subset.load(tmp_path / "tuned" / "subset.json").experts == KEPT
    merge_it_back(folder, tmp_path, new)
    results = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]


def merge_it_back(folder, tmp_path, new):
    """What `emo_jax.merge` makes of a fine-tuned subset, and what it refuses."""
    flags = [f"--tuned={tmp_path / 'tuned'}", f"--out={tmp_path / 'merged'}", f"--data={folder / 'task.jsonl'}"]
    done = run_main("merge", *flags, "--documents=20", "--sequence_length=64", "--noshared")
    assert done.returncode == 0, done.stderr
    old, merged = by_name(emo_jax.load(folder / "run").params), by_name(emo_jax.load(tmp_path / "merged").params)
    for name in old:
        if "routed" in name or "router" in name:
            kept, axis = list(KEPT[int(name.split("/")[1])]), 1 if "router" in name else 0
            rest = [e for e in range(7) if e not in kept]
            np.testing.assert_array_equal(merged[name].take(kept, axis), new[name])
            np.testing.assert_array_equal(merged[name].take(rest, axis), old[name].take(rest, axis))
        else:
            np.testing.assert_array_equal(merged[name], old[name])
    line = next(line for line in done.stdout.splitlines() if line.startswith("next")).split()
    batches, _ = examples_by_domain(
        str(folder / "task.jsonl"), folder / "run" / "tokenizer.json", 0, documents=20, sequence_length=64, batch_size=8
    )
    for column, run in ((1, folder / "run"), (2, tmp_path / "merged")):
        model = emo_jax.load(run)
        full = SubsetLosses(model.config, model.params, batches).full()["next"]
        np.testing.assert_allclose(float(line[column]), full.loss, atol=6e-4)
    refused = run_main("merge", *flags)
    assert refused.returncode == 2 and "merged holds something already" in refused.stderr
    refused = run_main("merge", f"--tuned={folder / 'run'}", f"--out={tmp_path / 'x'}")
    assert refused.returncode == 2 and "has no subset.json" in refused.stderr
    # A merged model is a folder to start from, not a run to continue.
    with pytest.raises(UserError, match="holds a model's weights, not a run's state"):
        train(Config.from_json((tmp_path / "merged" / "config.json").read_text()), tmp_path / "merged")


def test_a_subsets_experts_alone_are_trained_inside_the_frozen_model(folder, tmp_path):
    done = finetune(folder, tmp_path / "tuned", f"--subset={folder / 'subset.json'}", "--train=subset")
    assert done.returncode == 0, done.stderr
    old, new = (by_name(load_parameters(run)[1]) for run in (folder / "run", tmp_path / "tuned"))
    for name in old:
        if "routed" in name or "router" in name:
            kept = np.isin(np.arange(7), KEPT[int(name.split("/")[1])])
            axis = 1 if "router" in name else 0
            changed = (old[name] != new[name]).any(tuple(i for i in range(old[name].ndim) if i != axis))
            np.testing.assert_array_equal(changed, kept, err_msg=name)
        else:
            np.testing.assert_array_equal(old[name], new[name], err_msg=name)  # weight decay does not move them either


def test_fresh_experts_add_nothing_at_first_and_learn_alone(folder, tmp_path):
    done = finetune(folder, tmp_path / "tuned", "--train=new", "--new_experts=2", "--epochs=3")
    assert done.returncode == 0, done.stderr
    old, new = (by_name(load_parameters(run)[1]) for run in (folder / "run", tmp_path / "tuned"))
    for name in old:
        if "router" in name:
            np.testing.assert_array_equal(old[name], new[name][:, :7])
            assert new[name].shape[1] == 9
        elif "routed" in name:
            np.testing.assert_array_equal(old[name], new[name][:7])
            assert len(new[name]) == 9 and np.abs(new[name][7:]).max() > 0
        else:
            np.testing.assert_array_equal(old[name], new[name])
    results = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"] - 0.05


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, tmp_path):
    flags = [f"--subset={folder / 'subset.json'}", "--config.train.checkpoint_every=2"]
    assert finetune(folder, tmp_path / "whole", *flags).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    last = max((tmp_path / "stopped" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(last)
    assert finetune(folder, tmp_path / "stopped", *flags).returncode == 0
    whole, stopped = (by_name(load_parameters(tmp_path / name)[1]) for name in ("whole", "stopped"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], stopped[name])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--train=subset"], "--train=subset needs --subset=FILE"),
        (["--new_experts=2"], "--train=all with --new_experts=2: fresh experts and --train=new belong together"),
        (["--train=some"], "--train='some' is not one of"),
        (["--epochs=0"], "--epochs=0.0 must be positive"),
        (["--config.optimiser.learning_rate=1"], "There is no config field 'optimiser.learning_rate'"),
    ],
)
def test_a_mistake_is_told_in_words(folder, tmp_path, flags, words):
    done = finetune(folder, tmp_path / "x", *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_another_models_subset_and_examples_without_answers_are_refused(folder, tmp_path):
    (tmp_path / "foreign.json").write_text(Subset(KEPT, "0123").to_json())
    done = finetune(folder, tmp_path / "x", f"--subset={tmp_path / 'foreign.json'}")
    assert done.returncode == 2 and "The subset was chosen for the model 0123" in done.stderr
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    done = finetune(folder, tmp_path / "x", f"--data={tmp_path / 'bad.jsonl'}")
    assert done.returncode == 2 and "bad.jsonl:2 has no string field 'answer'" in done.stderr


@needs_golden
def test_released_weights_go_through_selection_fine_tuning_and_merging(folder, tmp_path):
    model = tmp_path / "released"
    shutil.copytree(GOLDEN / "emo_tiny", model)
    values = json.loads((model / "config.json").read_text())
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())[:250]])}
    tokenizer = Tokenizer(BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text(json.dumps(values | {"eos_token_id": 0}))
    texts = f"--data={folder / 'task.jsonl'}"
    keep = values["num_experts_per_tok"] + 1
    subset = f"{tmp_path / 'subset.json'}"
    done = run_main("select", f"--model={model}", texts, f"--keep={keep}", f"--out={subset}", "--documents=20")
    assert done.returncode == 0, done.stderr
    flags = [f"--model={model}", texts, f"--subset={subset}", f"--workdir={tmp_path / 'tuned'}"]
    done = run_main("finetune", *flags, "--config.data.sequence_length=48", "--config.optimizer.learning_rate=0.005")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    done = run_main("merge", f"--tuned={tmp_path / 'tuned'}", f"--out={tmp_path / 'merged'}", "--weight=0.5")
    assert done.returncode == 0, done.stderr
    old, new = (by_name(emo_jax.load(path).params) for path in (model, tmp_path / "merged"))
    kept = Subset.load(subset).experts[0]
    changed = [
        (old["layers/00/moe/routed/up"][e] != new["layers/00/moe/routed/up"][e]).any()
        for e in range(len(old["layers/00/moe/routed/up"]))
    ]
    assert [e for e, moved in enumerate(changed) if moved] == list(kept)
