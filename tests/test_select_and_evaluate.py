"""`emo_jax.select` and `emo_jax.evaluate` as their user runs them, and a loaded model confined to a subset."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

import emo_jax
from emo_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig
from emo_jax.errors import UserError
from emo_jax.modularity import Subset, fingerprint
from emo_jax.training import train

WORDS = {"cooking": "simmer onions butter stock salt pepper", "sailing": "skipper sheet keel wind rises mast"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run in `run`, and its texts."""
    path, rng = tmp_path_factory.mktemp("select"), np.random.default_rng(0)
    lines = []
    for _ in range(120):
        domain = str(rng.choice(sorted(WORDS)))
        lines.append({"text": " ".join(rng.choice(WORDS[domain].split(), 12)), "domain": domain})
    (path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=2, num_heads=2, num_experts=8, top_k=3, d_expert=8, dtype="float32"
        ),
        pool=PoolConfig(min=2, max=8),
        data=DataConfig(source="jsonl", path=str(path / "texts.jsonl"), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=12, eval_every=0, checkpoint_every=12),
    )
    train(config, path / "run", log=lambda text: None)
    return path


def select(*flags):
    return command("emo_jax.select", *flags)


def evaluate(folder, *flags):
    texts = folder / "texts.jsonl"
    return command("emo_jax.evaluate", f"--model={folder / 'run'}", f"--data={texts}", "--sequence_length=64", *flags)


def command(module, *flags):
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", module, *map(str, flags)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=variables | {"JAX_PLATFORMS": "cpu"}
    )


def test_a_subset_is_chosen_stored_composed_applied_and_cut(folder):
    texts, model = f"--data={folder / 'texts.jsonl'}", f"--model={folder / 'run'}"
    for domain in WORDS:
        done = select(model, texts, f"--domain={domain}", "--keep=4", f"--out={folder / domain}.json")
        assert done.returncode == 0, done.stderr
        assert "3 routed experts in each of 2 mixture layers (router_mass keep=4" in done.stdout
    both = folder / "both.json"
    done = select("--compose=union", f"--subsets={folder}/cooking.json,{folder}/sailing.json", f"--out={both}")
    assert done.returncode == 0 and "mixture layer 1:" in done.stdout

    loaded = emo_jax.load(folder / "run")
    subset = Subset.load(folder / "cooking.json")
    tokens = np.random.default_rng(0).integers(1, 300, (2, 16))
    full, masked = loaded(tokens), loaded.apply_subset(subset)(tokens)
    assert np.abs(full - masked).max() > 1e-4
    smaller = loaded.cut(subset)
    np.testing.assert_allclose(smaller(tokens), masked, rtol=1e-4, atol=1e-5)
    assert sum(x.nbytes for x in jax.tree.leaves(smaller.params)) < sum(
        x.nbytes for x in jax.tree.leaves(loaded.params)
    )
    np.testing.assert_array_equal(loaded.apply_subset(subset).apply_subset(None)(tokens), full)
    everything = Subset((tuple(range(7)),) * 2, subset.model)
    np.testing.assert_allclose(loaded.apply_subset(everything)(tokens), full, rtol=1e-5, atol=1e-6)
    other = emo_jax.api.Model(loaded.config, jax.tree.map(lambda leaf: leaf + 1, loaded.params))
    with pytest.raises(UserError, match="its experts mean something else"):
        other.apply_subset(subset)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--keep=2"], "keep=2 must lie in 3..8"),
        (["--keep=4", "--domain=law"], "holds no examples of domain 'law'; its domains are 'cooking', 'sailing'"),
        (["--keep=4", "--method=best"], "method='best' is not one of"),
        (["--keep=4", "--compose=union"], "--compose works on --subsets alone"),
    ],
)
def test_a_mistake_is_told_in_words(folder, flags, words):
    done = select(f"--model={folder / 'run'}", f"--data={folder / 'texts.jsonl'}", f"--out={folder / 'x.json'}", *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "x.json").exists()


def test_an_evaluation_prints_and_writes_losses_retention_and_the_matrix(folder, tmp_path):
    texts = folder / "texts.jsonl"
    done = evaluate(folder, f"--calibration={texts}", "--keep=8,4", "--methods=router_mass,reap", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "evaluation.json").read_text())
    losses, retained, matrix = made.values()
    assert [line[0] for line in losses] == ["domain", "cooking", "sailing"]
    model = emo_jax.load(folder / "run")
    tokenizer, nats, tokens, size, hits = Tokenizer.from_file(str(model.tokenizer)), 0.0, 0, 0, 0
    for line in map(json.loads, texts.read_text().splitlines()):
        if line["domain"] == "cooking":
            ids = np.array([[*tokenizer.encode(line["text"]).ids, model.end_of_text_id]])
            log_p = np.asarray(jax.nn.log_softmax(model(np.pad(ids, ((0, 0), (0, 40 - ids.shape[1])))))[0], np.float64)
            for place, target in enumerate(ids[0, 1:]):
                nats -= log_p[place, target]
                hits += log_p[place].argmax() == target
            tokens, size = tokens + ids.shape[1] - 1, size + len(line["text"].encode())
    np.testing.assert_allclose(losses[1][1:4], [nats / tokens, hits / tokens, nats / np.log(2) / size], rtol=1e-4)
    assert losses[1][4] == tokens
    keys = [(domain, method, keep) for domain in WORDS for method in ("router_mass", "reap") for keep in (8, 4)]
    assert [tuple(line[:3]) for line in retained[1:]] == keys
    assert all(abs(line[4]) < 1e-5 and abs(line[5]) < 1e-5 for line in retained[1:] if line[2] == 8)  # all experts
    assert matrix[0] == ["chosen for", "cooking", "sailing"]
    own = next(line[4] for line in retained if line[:3] == ["cooking", "router_mass", 4])
    np.testing.assert_allclose(matrix[1][1], own, atol=1e-6)
    np.testing.assert_allclose(
        matrix[3][1], (matrix[1][2] + matrix[2][1] - matrix[1][1] - matrix[2][2]) / 2, rtol=1e-5, atol=1e-6
    )
    for cell in ("cooking", f"{losses[1][1]:.3f}", "chosen for"):
        assert cell in done.stdout
    assert (tmp_path / "evaluation.csv").read_text().startswith("losses\n")


def test_one_subset_is_evaluated_kept_or_ablated(folder):
    subset = Subset(((0, 1, 2), (0, 1, 2)), fingerprint_of(folder))
    (folder / "three.json").write_text(subset.to_json())
    for how in ("subset", "ablate"):
        done = evaluate(folder, f"--{how}={folder / 'three.json'}", "--documents=5")
        assert done.returncode == 0, done.stderr
        assert f"{'with' if how == 'subset' else 'without'} the experts of {folder / 'three.json'}" in done.stdout
    (folder / "foreign.json").write_text(Subset(subset.experts, "0123").to_json())
    refused = evaluate(folder, f"--subset={folder / 'foreign.json'}")
    assert refused.returncode == 2 and "The subset was chosen for the model 0123" in refused.stderr
    refused = evaluate(folder, "--keep=8")
    assert refused.returncode == 2 and "--calibration='' and --keep='8' belong together" in refused.stderr


def fingerprint_of(folder):
    model = emo_jax.load(folder / "run")
    return fingerprint(model.config, model.params)
