"""`emo_jax.select` and `emo_jax.evaluate` as their user runs them, and a loaded model confined to a subset."""

import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

import emo_jax
from emo_jax.errors import UserError
from emo_jax.modularity import Subset, fingerprint
from emo_jax.training import train
from tests.mains import run_main, small_run, write_texts

WORDS = {"cooking": "simmer onions butter stock salt pepper", "sailing": "skipper sheet keel wind rises mast"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run in `run`, and its texts."""
    path = tmp_path_factory.mktemp("select")
    write_texts(path / "texts.jsonl", WORDS, 120)
    train(small_run(path / "texts.jsonl", steps=12), path / "run", log=lambda text: None)
    return path


def select(*flags):
    return run_main("select", *flags)


def evaluate(folder, *flags):
    texts = folder / "texts.jsonl"
    return run_main("evaluate", f"--model={folder / 'run'}", f"--data={texts}", "--sequence_length=64", *flags)


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
    np.testing.assert_array_equal(loaded.apply_subset(folder / "cooking.json")(tokens), masked)
    smaller = loaded.cut(str(folder / "cooking.json"))
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
    made = json.loads((tmp_path / "evaluation.json").read_text())["models"]["run"]
    losses, retained, matrix = (made[name] for name in ("losses", "retention", "matrix"))
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
    assert [tuple(line[:3]) for line in retained[1:-4]] == keys
    for mean in retained[-4:]:
        lines = [line[3:] for line in retained[1:-4] if line[1:3] == mean[1:3]]
        assert mean[0] == "mean" and len(lines) == 2
        np.testing.assert_allclose(mean[3:], np.mean(lines, axis=0), rtol=1e-6, atol=1e-12)
    assert all(abs(line[4]) < 1e-5 and abs(line[5]) < 1e-5 for line in retained[1:] if line[2] == 8)  # all experts
    assert matrix[0] == ["chosen for", "cooking", "sailing"]
    own = next(line[4] for line in retained if line[:3] == ["cooking", "router_mass", 4])
    np.testing.assert_allclose(matrix[1][1], own, atol=1e-6)
    np.testing.assert_allclose(
        matrix[3][1], (matrix[1][2] + matrix[2][1] - matrix[1][1] - matrix[2][2]) / 2, rtol=1e-5, atol=1e-6
    )
    for cell in ("cooking", f"{losses[1][1]:.3f}", "chosen for"):
        assert cell in done.stdout
    assert (tmp_path / "evaluation.csv").read_text().startswith("run,losses\n")
    assert "Off the diagonal minus on it" in (tmp_path / "retention.html").read_text()


def test_runs_are_compared_on_their_own_texts_and_a_report_shows_it(folder, tmp_path):
    run = tmp_path / "again"
    shutil.copytree(folder / "run", run)
    done = run_main("evaluate", f"--model={run}", "--keep=8,3", "--calibration_documents=5,1,0")
    assert done.returncode == 0, done.stderr
    made = json.loads((run / "evaluation.json").read_text())["models"]["again"]
    # The full loss is that of the run's last evaluation, but for where rows are cut.
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]["domains"]
    for domain, loss, _, _, tokens in made["losses"][1:]:
        assert abs(loss - last[domain]["loss"]) < 0.05 and abs(tokens - last[domain]["tokens"]) <= 8
    counts = [(line[0], line[2]) for line in made["calibration"][1:]]
    assert counts == [(d, n) for n in (5, 1, 0) for d in (*WORDS,)] + [("mean", n) for n in (5, 1, 0)]
    for line in made["retention"][1:]:
        if line[2] == 3:
            same = next(row for row in made["calibration"] if row[0] == line[0] and row[2] == 5)
            np.testing.assert_allclose(same[3:], line[4:6], atol=1e-9)
    assert "Keep only the experts a domain needs" in (run / "report.html").read_text()
    # Another evaluation of the same weights adds to it.
    (tmp_path / "three.json").write_text(Subset(((0, 1, 2), (0, 1, 2)), fingerprint_of(folder)).to_json())
    done = run_main("evaluate", f"--model={run}", f"--ablate={tmp_path / 'three.json'}")
    assert done.returncode == 0, done.stderr
    more = json.loads((run / "evaluation.json").read_text())["models"]["again"]
    assert more.keys() - made.keys() == {"ablated"} and more["retention"] == made["retention"]

    out = tmp_path / "out"
    done = run_main("evaluate", f"--model={run},{folder / 'run'}", "--keep=8,4", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "Means over the domains" in done.stdout
    page = (out / "retention.html").read_text()
    assert "again" in page and "What survives" in page
    both = json.loads((out / "evaluation.json").read_text())["models"]
    assert both["again"] == both["run"]  # the same weights
    refused = run_main("evaluate", f"--model={run},{folder / 'run'}", "--subset=x.json")
    assert refused.returncode == 2 and "is a subset of one model; --model names 2" in refused.stderr


def test_a_benchmark_is_run_on_the_model_and_on_its_subset(folder, tmp_path):
    pytest.importorskip("lm_eval")
    lines = [{"question": "simmer onions", "choices": [" butter", " keel"], "answer": n % 2} for n in range(6)]
    (tmp_path / "six.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "six.yaml").write_text(
        "task: six\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'six.jsonl'}}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "some.json").write_text(Subset(((0, 1, 2), (0, 1, 2)), fingerprint_of(folder)).to_json())
    flags = ["--tasks=six", f"--task_path={tmp_path}", f"--subset={folder / 'some.json'}"]
    done = run_main("evaluate", f"--model={folder / 'run'}", *flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]["run"]
    assert made.keys() == {"tasks"}
    assert made["tasks"][1][:3] == ["six", "acc", 0.5] and made["tasks"][1][4] == 6
    refused = evaluate(folder, "--tasks=seven", f"--task_path={tmp_path}")
    assert refused.returncode == 2 and "There is no task 'seven'" in refused.stderr


def test_one_subset_is_evaluated_kept_or_ablated(folder):
    subset = Subset(((0, 1, 2), (0, 1, 2)), fingerprint_of(folder))
    (folder / "three.json").write_text(subset.to_json())
    for how in ("subset", "ablate"):
        done = evaluate(folder, f"--{how}={folder / 'three.json'}", "--documents=5")
        assert done.returncode == 0, done.stderr
        assert ("With the experts of the subset" if how == "subset" else "Without the experts") in done.stdout
    (folder / "foreign.json").write_text(Subset(subset.experts, "0123").to_json())
    refused = evaluate(folder, f"--subset={folder / 'foreign.json'}")
    assert refused.returncode == 2 and "The subset was chosen for the model 0123" in refused.stderr
    refused = evaluate(folder, "--keep=8")
    assert refused.returncode == 2 and "--calibration is empty" in refused.stderr
    refused = evaluate(folder, f"--calibration={folder / 'texts.jsonl'}", "--keep=8,2")
    assert refused.returncode == 2 and "keep=2 must lie in 3..8" in refused.stderr and "cooking" not in refused.stdout
    refused = evaluate(folder, "--keep=eight")
    assert refused.returncode == 2 and "--keep='eight' must be numbers" in refused.stderr


def fingerprint_of(folder):
    model = emo_jax.load(folder / "run")
    return fingerprint(model.config, model.params)
