"""`emo_jax.emoe` as its user runs it: published models opened up, fine-tuned, made dense again and written back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import emo_jax
from emo_jax.emoe import layer_list
from emo_jax.errors import UserError
from emo_jax.model import bind
from emo_jax.training import train
from emo_jax.training.conversion import export_folder, import_folder
from emo_jax.training.splitting import merge_folder, split_folder
from emo_jax.training.weights import load_parameters, saved_parameters
from tests.data.conftest import write_wordpiece
from tests.mains import run_main, small_run, write_texts

GOLDENS = Path(__file__).parent / "interop" / "data"
WORDS = {"cooking": "simmer onions butter stock salt pepper", "sailing": "keel wind mast sail anchor tide"}


def outputs(folder: Path) -> np.ndarray:
    """Logits of the golden's input, or an encoder's hidden states."""
    model = emo_jax.load(folder)
    expected = load_file(GOLDENS / folder.name / "expected.safetensors") if (GOLDENS / folder.name).exists() else None
    assert expected is not None
    tokens = expected["input_ids"].astype(np.int32)
    types = expected["token_type_ids"].astype(np.int32) if "token_type_ids" in expected else None
    places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    bound = bind(model.config, model.params)
    hidden, _ = bound(tokens, np.ones_like(tokens), places, token_types_BS=types)
    return np.asarray(bound.logits(hidden) if model.config.causal or model.config.labels else hidden)


def golden(folder: Path) -> np.ndarray:
    expected = load_file(GOLDENS / folder.name / "expected.safetensors")
    return expected.get("logits", expected.get("last_hidden_state"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_tied", "bert", "olmo2"])
def test_a_published_model_survives_split_and_merge_bit_for_bit(name, tmp_path):
    source, log = GOLDENS / name, []
    expected = golden(source)
    np.testing.assert_allclose(outputs(source), expected, atol=3e-5)
    (tmp_path / "split").mkdir()
    split_folder(source, tmp_path / "split" / name, layers=[0, 1], experts=8, top_k=8, log=log.append)
    assert len(log) == 3 and "layer 1: mean cosine of two keys of an expert" in log[2]
    np.testing.assert_allclose(outputs(tmp_path / "split" / name), expected, atol=3e-5)  # top-k = all
    _, params, _ = load_parameters(tmp_path / "split" / name)
    order = params["layers"]["01"]["ffn"]["order"]
    assert (np.sort(order) == np.arange(len(order))).all()
    assert (np.diff(np.asarray(order).reshape(8, -1)) > 0).all()  # 8 experts of one size
    merge_folder(tmp_path / "split" / name, tmp_path / "merged")
    export_folder(tmp_path / "merged", tmp_path / name)
    np.testing.assert_allclose(outputs(tmp_path / name), expected, atol=3e-5)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, source))
    pooler = {key for key in theirs if "pooler" in key}  # of a BERT without labels, which ours has not
    assert ours.keys() == theirs.keys() - pooler
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


@pytest.mark.parametrize("name", ["gpt2_classifier", "llama_classifier", "bert_classifier"])
def test_a_published_classifier_keeps_its_head(name, tmp_path):
    expected = golden(GOLDENS / name)
    split_folder(GOLDENS / name, tmp_path / "split", layers=[1], experts=4, top_k=4, method="random")
    merge_folder(tmp_path / "split", tmp_path / "merged")
    export_folder(tmp_path / "merged", tmp_path / name)
    logits = outputs(tmp_path / name)
    logits = logits[:, 0] if name == "bert_classifier" else logits[:, -1]
    np.testing.assert_allclose(logits, expected, atol=3e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small dense model in `run`, and texts."""
    path = tmp_path_factory.mktemp("emoe")
    write_texts(path / "texts.jsonl", WORDS, 200)
    config = small_run(path / "texts.jsonl", steps=8)
    config.model.num_experts, config.model.d_dense, config.pool.kind = 0, 32, "none"
    train(config, path / "run", log=lambda text: None)
    return path


def test_a_split_model_is_fine_tuned_with_lora_cut_evaluated_and_merged(folder, tmp_path):
    opened = run_main("emoe", "split", f"--model={folder / 'run'}", f"--out={tmp_path / 'split'}", "--experts=8",
                      "--topk=2", "--layers=last:1", "--method=coactivation",
                      f"--data={folder / 'texts.jsonl'}")  # fmt: skip
    assert opened.returncode == 0, opened.stderr
    assert "2 of 8 experts a token" in opened.stdout
    done = run_main("finetune", f"--model={tmp_path / 'split'}", f"--data={folder / 'texts.jsonl'}",
                    f"--workdir={tmp_path / 'tuned'}", "--config.data.sequence_length=32",
                    "--config.optimizer.lora_rank=2", "--config.optimizer.learning_rate=0.05",
                    "--config.balance.kind=importance", "--config.balance.gate_noise=1.0", "--epochs=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = emo_jax.load(folder / "run").config  # LoRA of rank 2: queries and values of two layers
    assert f"{2 * 2 * 2 * (model.d_model + model.num_heads * model.head_dim)} trained;" in done.stdout
    results = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"] - 0.02
    line = json.loads((tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(line["routing"]["load_max_over_mean"]) == 1  # one split layer
    before, after = emo_jax.load(tmp_path / "split"), emo_jax.load(tmp_path / "tuned")
    for layer in ("00", "01"):
        old, new = before.params["layers"][layer], after.params["layers"][layer]
        assert (np.asarray(old["ffn"]["up"]) == np.asarray(new["ffn"]["up"])).all()
        assert (np.asarray(old["attention"]["query"]) != np.asarray(new["attention"]["query"])).any()
    report = run_main("evaluate", f"--model={tmp_path / 'tuned'}", "--keep=8,4", f"--out={tmp_path / 'evaluated'}")
    assert report.returncode == 0, report.stderr
    assert "cooking" in report.stdout

    merged = run_main("emoe", "merge", f"--model={tmp_path / 'tuned'}", f"--out={tmp_path / 'merged'}")
    assert merged.returncode == 0, merged.stderr
    dense = emo_jax.load(tmp_path / "merged")
    assert dense.config.split_layers == () and dense.config == emo_jax.load(folder / "run").config
    tokens = np.arange(20).reshape(1, -1) + 5
    after.config.split_top_k = 8
    everything = emo_jax.api.Model(after.config, after.params)
    np.testing.assert_allclose(everything(tokens), dense(tokens), atol=1e-5)
    np.testing.assert_array_equal(after.merge()(tokens), dense(tokens))


def test_an_encoder_learns_to_classify_pairs_opened_up_and_goes_back_to_its_format(tmp_path):
    source = tmp_path / "bert"
    shutil.copytree(GOLDENS / "bert", source)
    write_wordpiece(source / "tokenizer.json")
    rng, lines = np.random.default_rng(0), []
    for number in range(240):
        kinds = rng.integers(0, 2, 2)
        texts = [" ".join(rng.choice(WORDS[("cooking", "sailing")[kind]].split(), 4)) for kind in kinds]
        label = "after" if kinds[1] else "before"
        lines.append({"text": texts[0], "text_pair": texts[1], "label": label, "domain": f"part {number % 2}"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = run_main("emoe", "split", f"--model={source}", f"--out={tmp_path / 'split'}", "--experts=8", "--topk=4",
                      "--layers=1")  # fmt: skip
    assert opened.returncode == 0, opened.stderr
    refused = run_main("finetune", f"--model={tmp_path / 'split'}", f"--data={tmp_path / 'pairs.jsonl'}",
                       f"--workdir={tmp_path / 'no'}")  # fmt: skip
    assert refused.returncode == 2 and "is an encoder" in refused.stderr and "--classify" in refused.stderr
    done = run_main("finetune", f"--model={tmp_path / 'split'}", f"--data={tmp_path / 'pairs.jsonl'}", "--classify",
                    f"--workdir={tmp_path / 'tuned'}", "--epochs=8",
                    "--config.optimizer.learning_rate=0.005")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Held-out accuracy, before and after:" in done.stdout
    results = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    tuned = emo_jax.load(tmp_path / "tuned")
    assert tuned.config.labels == ("after", "before") and tuned.config.max_positions == 64
    some = [(line["text"], line["text_pair"]) for line in lines[:40]]
    probabilities = tuned.classify(some)
    assert probabilities.shape == (40, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    right = [
        tuned.config.labels[best] == line["label"] for best, line in zip(probabilities.argmax(1), lines, strict=False)
    ]
    assert np.mean(right) > 0.9
    merged = tuned.merge()
    merged.to_huggingface(tmp_path / "published")
    values = json.loads((tmp_path / "published" / "config.json").read_text())
    assert values["architectures"] == ["BertForSequenceClassification"]
    assert values["id2label"] == {"0": "after", "1": "before"}
    np.testing.assert_allclose(emo_jax.load(tmp_path / "published").classify(some), merged.classify(some), atol=1e-6)
    measured = run_main("evaluate", f"--model={tmp_path / 'tuned'}", f"--data={tmp_path / 'pairs.jsonl'}",
                        "--sequence_length=64", "--documents=0")  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    table = [line.split() for line in measured.stdout.splitlines() if line.startswith(("domain", "part"))]
    assert table[0] == ["domain", "loss", "accuracy", "texts"]
    assert sum(int(row[-1]) for row in table[1:3]) == len(lines)


WRONG = [
    (["--layers=2"], "--layers=2 names layer 2, but the model has layers 0..1"),
    (["--experts=5"], "model.split_experts=5 does not divide the 32 hidden neurons"),
    (["--experts=8", "--topk=9"], "model.split_top_k=9 must lie in 1..8"),
    (["--experts=8", "--method=k-means"], "Did you mean 'kmeans'?"),
    (["--experts=8", "--topk=4", "--method=coactivation"], "--method=coactivation needs texts: --data=FILE"),
    (["--experts=8", "--data=x.jsonl"], "--data does nothing here: only --method=coactivation reads texts"),
    (["--experts=4", "--copies", "--method=random"], "--method does nothing here: --copies groups no neurons"),
    (["--experts=4", "--topk=1", "--copies", "--gate=average_key"], "copies of one layer have equal keys"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_what_cannot_be_split_is_said_before_any_work(options, words, folder, tmp_path):
    done = run_main("emoe", "split", f"--model={folder / 'run'}", f"--out={tmp_path / 'out'}", "--layers=1", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_commands_are_named_and_keep_to_their_own_flags(folder, tmp_path):
    missing = run_main("emoe", f"--model={folder / 'run'}", f"--out={tmp_path / 'out'}")
    assert missing.returncode == 2 and "say what to do first, split or merge" in missing.stderr
    mistyped = run_main("emoe", "spilt", f"--model={folder / 'run'}", f"--out={tmp_path / 'out'}")
    assert mistyped.returncode == 2 and "split or merge, not 'spilt'" in mistyped.stderr
    wrong = run_main("emoe", "merge", f"--model={folder / 'run'}", f"--out={tmp_path / 'out'}", "--topk=3")
    assert wrong.returncode == 2 and "--topk does nothing here: that is for split" in wrong.stderr
    dense = run_main("emoe", "merge", f"--model={folder / 'run'}", f"--out={tmp_path / 'out'}")
    assert dense.returncode == 2 and "nothing to merge" in dense.stderr


def test_layers_are_named_by_numbers_slices_or_from_the_end():
    assert layer_list("10,11", 12) == (10, 11)
    assert layer_list("16:32:4", 32) == (16, 20, 24, 28)
    assert layer_list("8:", 12) == (8, 9, 10, 11)
    assert layer_list("last:2", 12) == (10, 11)
    assert layer_list("all", 3) == (0, 1, 2)
    for text, words in (("12", "names layer 12"), ("a", "is neither numbers"), ("last:0", "asks for 0 layers"),
                        ("9:9", "names none"), ("1:2:x", "is neither numbers"), ("-1", "names layer -1")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            layer_list(text, 12)


def test_a_mixture_is_not_split(tmp_path, folder):
    train(small_run(folder / "texts.jsonl", steps=3), tmp_path / "mixture", log=lambda text: None)
    with pytest.raises(UserError, match="only dense models are split"):
        split_folder(tmp_path / "mixture", tmp_path / "out", layers=[0], experts=2, top_k=1)


@pytest.mark.parametrize("by", ["folder", "split", "import"])
def test_a_classifier_made_of_an_encoder_begins_with_its_pooler(by, tmp_path):
    wanted = load_file(GOLDENS / "bert_classifier" / "model.safetensors")
    source = tmp_path / "bert"
    shutil.copytree(GOLDENS / "bert_classifier", source)
    values = json.loads((source / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (source / "config.json").write_text(json.dumps(values))
    tensors = {name.removeprefix("bert."): value for name, value in wanted.items() if "classifier" not in name}
    save_file(tensors, source / "model.safetensors")
    if by == "split":
        split_folder(source, tmp_path / by, layers=[0], experts=4, top_k=1, method="contiguous", log=lambda text: None)
    elif by == "import":
        import_folder(source, tmp_path / by, log=lambda text: None)
    else:
        source.rename(tmp_path / by)
    params = saved_parameters(tmp_path / by, labels=("no", "yes"))
    np.testing.assert_array_equal(params["pooler"], wanted["bert.pooler.dense.weight"].T)
    np.testing.assert_array_equal(params["pooler_bias"], wanted["bert.pooler.dense.bias"])
    assert "classifier" not in params
