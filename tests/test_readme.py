"""The README's Python, run as it stands there."""

import re
from pathlib import Path

import jax
import numpy as np

import emo_jax
from emo_jax.api import Model
from emo_jax.data import train_tokenizer
from emo_jax.model import ModelConfig, init_parameters

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    config = ModelConfig(
        vocab_size=300, d_model=32, num_layers=2, num_heads=2, num_experts=12, top_k=4, d_expert=16, dtype="float32"
    )
    train_tokenizer(["def main( the licence of a text " * 9], 300, "<end>").save(str(tmp_path / "t.json"))
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_parameters(config, 1))
    Model(config, params, tmp_path / "t.json", end_of_text_id=0).save(tmp_path / "runs" / "emo_tiny")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, str(README), "exec"), names)
    assert names["logits"].shape == (2, 3, 300)
    assert "length" in capsys.readouterr().out
    assert names["small"].config.routed_experts == (7, 7)
    tokens = [[5, 17, 3]]
    wanted = names["small"](tokens)
    np.testing.assert_allclose(emo_jax.load("runs/small")(tokens), wanted, atol=1e-5)
    rounded = emo_jax.load("runs/small_hf", dtype="float32")
    np.testing.assert_allclose(rounded(tokens), wanted, atol=0.05 * np.abs(wanted).max())
    assert emo_jax.load("runs/small_hf").config.dtype == rounded.params["embedding"].dtype == "bfloat16"
