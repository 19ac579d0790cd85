"""`emo_jax.convert` as its user runs it."""

import json

import ml_dtypes

import emo_jax
from emo_jax.interop import read_config, read_parameters
from emo_jax.training import train
from emo_jax.training.conversion import export_folder, import_folder
from emo_jax.training.weights import load_parameters
from tests.mains import run_main, small_run
from tests.training.test_conversion import assert_bits, assert_same_folder, by_name, published


def convert(*flags):
    return run_main("convert", *flags)


def test_a_folder_is_imported_and_exported_again(tmp_path):
    source = published(tmp_path / "source", dtype="bfloat16", ids=9)
    done = convert(f"--from={source}", f"--to={tmp_path / 'model'}")
    assert done.returncode == 0, done.stderr
    assert "The vocabulary's 11 rows are cropped to 9." in done.stdout
    assert f"python -m emo_jax.generate --model={tmp_path / 'model'} --prompt=" in done.stdout
    export_folder(tmp_path / "model", tmp_path / "again")
    assert_same_folder(tmp_path / "again", source)


def test_a_trained_run_becomes_a_folder_and_a_saved_model_again(tmp_path):
    lines = [{"text": f"Text {number} of some that are all alike."} for number in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, run = small_run(tmp_path / "texts.jsonl", steps=3), tmp_path / "run"
    config.model.num_layers = 1
    train(config, run, log=lambda text: None)
    done = convert(f"--from={run}", f"--to_hf={tmp_path / 'exported'}", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    trained = by_name(load_parameters(run)[1])
    rounded = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in trained.items()}
    config = read_config(tmp_path / "exported")
    assert_bits(by_name(read_parameters(tmp_path / "exported", config)), rounded)
    values = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert values["torch_dtype"] == "bfloat16" and values["max_position_embeddings"] == 32
    import_folder(tmp_path / "exported", tmp_path / "model", log=lambda text: None)
    assert_bits(by_name(load_parameters(tmp_path / "model")[1]), rounded)
    assert emo_jax.load(tmp_path / "model").end_of_text == "<|endoftext|>"
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_mistakes_are_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    attempts = {
        ("--from=here", "--to=there", "--to_hf=there"): "Give either --to=DIR",
        ("--from=nobody/nothing", f"--to={tmp_path / 'new'}"): "no repository of that name could be downloaded",
    }
    for flags, message in attempts.items():
        done = convert(*flags)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
