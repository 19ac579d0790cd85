"""`emo_jax.generate` as its user runs it: what is printed where, subsets, pools, and mistakes in words."""

import re

import jax
import pytest

import emo_jax
from emo_jax.api import Model
from emo_jax.data import train_tokenizer
from emo_jax.model import ModelConfig, init_parameters
from tests.mains import run_main

PROMPTS = ("simmer the onions", "wind and keel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with random weights in `model`, and a subset of its experts."""
    path = tmp_path_factory.mktemp("generate")
    train_tokenizer(["simmer the onions in butter, wind and keel and mast " * 9], 300, "<end>").save(
        str(path / "t.json")
    )
    config = ModelConfig(
        vocab_size=300, d_model=32, num_layers=2, num_heads=2, num_experts=8, top_k=3, d_expert=16, dtype="float32"
    )
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_parameters(config, 1))
    model = Model(config, params, path / "t.json", end_of_text_id=0)
    model.save(path / "model")
    (path / "subset.json").write_text(model.select(PROMPTS, keep=4).to_json())
    return path


def generate(folder, *flags):
    return run_main("generate", f"--model={folder / 'model'}", "--max_new_tokens=12", *flags)


def test_one_prompt_is_streamed_and_its_speed_is_told(folder):
    done = generate(folder, f"--prompt={PROMPTS[0]}")
    assert done.returncode == 0, done.stderr
    wanted = emo_jax.load(folder / "model").generate(PROMPTS[0], max_new_tokens=12)[0].text
    assert done.stdout == f"{PROMPTS[0]}{wanted}\n"
    assert re.search(
        r"\d+ prompt tokens and the first new one in [\d.]+ s, .* 10 tokens at [\d,]+ tokens/s", done.stderr
    )


def test_several_prompts_a_subset_and_a_pool(folder):
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    flags = ["--pool=prompt:2", "--temperature=0.9", "--top_k=20", "--seed=3", "--stop=zzz"]
    done = generate(folder, f"--prompts={folder / 'prompts.txt'}", f"--subset={folder / 'subset.json'}", *flags)
    assert done.returncode == 0, done.stderr
    small = emo_jax.load(folder / "model", folder / "subset.json")
    assert small.config.routed_experts == (3, 3)
    found = small.generate(PROMPTS, max_new_tokens=12, pool="prompt:2", temperature=0.9, top_k=20, seed=3)
    assert done.stdout == "".join(f"{p}{c.text}\n\n" for p, c in zip(PROMPTS, found, strict=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--prompt is empty; give a text to continue"),
        (["--prompt=a", "--temperature=-1"], "temperature=-1.0 must not be negative"),
        (["--prompt=a", "--pool=32"], "pool='32' must be none, or prompt:N"),
        (["--prompts=nowhere.txt"], "--prompts='nowhere.txt' is not a file"),
    ],
)
def test_mistakes_are_told_in_words(folder, flags, words):
    done = generate(folder, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and "Traceback" not in done.stderr
