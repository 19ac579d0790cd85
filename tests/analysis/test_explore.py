"""`emo_jax.explore` as its user runs it, and what it writes."""

import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import emo_jax
from emo_jax.analysis import choose_documents, read_routers, read_texts
from emo_jax.analysis import explore as explore_models
from emo_jax.analysis.exploration import measure, model_names, plain, summary, write_analysis
from emo_jax.analysis.plots import write_figures
from emo_jax.analysis.reading import Reading, Text
from emo_jax.errors import UserError
from emo_jax.training import train
from tests.mains import run_main, small_run, write_texts

WORDS = {
    "cooking": "simmer onions butter stock salt pepper the a",
    "sailing": "skipper sheet keel wind rises mast the a",
    "code": "def return import self ( ) = :",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three checkpoints in `run`, and its texts."""
    path = tmp_path_factory.mktemp("explore")
    write_texts(path / "texts.jsonl", WORDS, 150)
    config = small_run(path / "texts.jsonl", steps=30)
    config.train = dataclasses.replace(config.train, checkpoint_every=10, checkpoints_kept=3)
    train(config, path / "run", log=lambda text: None)
    return path


def explore(folder, out, *flags, models="run", data="texts.jsonl"):
    paths = ",".join(str(folder / name) for name in models.split(","))
    texts = [f"--data={folder / data}"] if data else []
    return run_main("explore", f"--models={paths}", f"--out={out}", *texts, *flags)


@pytest.fixture(scope="module")
def explored(folder, tmp_path_factory):
    """What a comparison of two runs prints, and where it wrote."""
    shutil.copytree(folder / "run", folder / "again")
    out = tmp_path_factory.mktemp("out") / "deep" / "folder"
    flags = ["--clusters=6", "--tokens=20", "--documents=60", "--prose=cooking,sailing", "--saturation"]
    done = explore(folder, out, *flags, models="run,again")
    assert done.returncode == 0, done.stderr
    return done, out


def test_it_prints_and_writes_what_the_functions_give(folder, explored):
    done, out = explored
    value = json.loads((out / "analysis.json").read_text())
    assert value["version"] == 1 and value["settings"]["prose"] == ["cooking", "sailing"]
    assert value["data"]["documents"] == 60 and value["data"]["documents_per_domain"] == dict.fromkeys(
        sorted(WORDS), 20
    )
    assert [model["name"] for model in value["models"]] == ["run", "again"]
    first, second = value["models"]
    assert first | {"name": ""} == second | {"name": ""}  # equal weights, equal numbers

    texts = choose_documents(read_texts(str(folder / "texts.jsonl")), 60, 0)
    reading = read_routers(emo_jax.load(folder / "run"), texts, 20, "run")
    _, numbers = measure(reading, texts, clusters=6, prose={"cooking", "sailing"}, seed=0)
    assert plain(numbers) == {key: part for key, part in first.items() if key != "saturation"}
    assert set(first["saturation"]) == {"10", "20"}
    assert all(0 < share <= 1 for layers in first["saturation"].values() for share in layers)
    assert np.mean(first["saturation"]["20"]) > 0.5 and "of the choices that it makes at step 30" in done.stdout

    assert first["prose"]["domains"] == ["cooking", "sailing"] and len(first["layers"]) == 2
    for one in (first, first["prose"]):
        assert sum(one["clusters"]["size"]) == sum(one["tokens"].values()) and len(one["clusters"]["size"]) == 6
        assert sum(one["document_clusters"]["size"]) == sum(one["documents"].values())
        assert set(one["mutual"]) == {"domain", "token", "domain_given_token"}
    for title, part in (("All text", ""), ("Prose alone", "prose")):
        table = summary(value["models"], title, part)
        for line in table[1:]:
            assert any(
                line[0].strip() in printed and f"{line[1]:.3f}" in printed for printed in done.stdout.splitlines()
            )
        assert title in done.stdout
    assert "<script" in (out / "explore.html").read_text()
    for name in ("experts-run", "experts-again", "coverage", "similarity", "information", "agreement"):
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        texts_in = [node.text for node in ElementTree.parse(out / "figures" / f"{name}.svg").iter() if node.text]
        assert any("cooking" in text or "again" in text for text in texts_in), name
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "explore.html", "figures"]


def test_the_same_command_writes_the_same_bytes(folder, explored, tmp_path):
    _, out = explored
    flags = ["--clusters=6", "--tokens=20", "--documents=60", "--prose=cooking,sailing", "--saturation"]
    done = explore(folder, tmp_path, *flags, models="run,again")
    assert done.returncode == 0, done.stderr
    for file in ("analysis.json", "figures/similarity.svg", "figures/agreement.png"):
        assert (tmp_path / file).read_bytes() == (out / file).read_bytes()


def test_without_data_it_reads_what_the_first_run_held_out(folder, tmp_path):
    done = explore(folder, tmp_path / "out", "--clusters=4", data="")
    assert done.returncode == 0, done.stderr
    value = json.loads((tmp_path / "out" / "analysis.json").read_text())
    counts = value["data"]["documents_per_domain"]
    assert sum(counts.values()) == value["data"]["documents"] >= 3 and set(counts) <= set(WORDS)
    texts = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    page = (tmp_path / "out" / "explore.html").read_text()
    assert sum(text["text"] in page for text in texts) == value["data"]["documents"]

    emo_jax.load(folder / "run").to_huggingface(tmp_path / "hf")
    done = explore(tmp_path, tmp_path / "other", models="hf", data="")
    assert done.returncode == 2 and "has no held-out texts of its own; name some with --data=FILE" in done.stderr


def test_texts_without_domains_have_clusters_but_nothing_to_compare(folder, tmp_path):
    lines = [{"text": line} for words in WORDS.values() for line in (words, words[::-1])]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = explore(folder, tmp_path / "out", "--clusters=3", data=tmp_path / "plain.jsonl")
    assert done.returncode == 0, done.stderr
    [model] = json.loads((tmp_path / "out" / "analysis.json").read_text())["models"]
    assert model["domains"] == [""] and model["mutual"] is None and "nmi" not in model["clusters"]
    assert sorted(path.name for path in (tmp_path / "out" / "figures").glob("*.png")) == [
        "coverage.png",
        "experts-run.png",
    ]
    assert "NMI" not in done.stdout and (tmp_path / "out" / "explore.html").is_file()


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--clusters=1", "--clusters=1 must be at least 2"),
        ("--documents=-1", "--documents=-1 must be at least 0"),
        (
            "--prose=cookin,sailing",
            "--prose='cookin' is not one of 'code', 'cooking', 'sailing'. Did you mean 'cooking'?",
        ),
    ],
)
def test_a_mistake_is_printed_without_a_traceback(folder, tmp_path, flag, words):
    done = explore(folder, tmp_path / "out", flag)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_told_in_words(folder, tmp_path):
    data = str(folder / "texts.jsonl")
    run, short, file = folder / "run", tmp_path / "short", tmp_path / "file"
    file.write_text("")
    shutil.copytree(run, short)
    for step in ("10", "20"):
        shutil.rmtree(short / "checkpoints" / step)
    for models, options, words in (
        ([run, folder / "nowhere"], {}, "nowhere is not a folder"),
        ([run, folder / "x/../run"], {}, "names a model twice"),
        ([run], {"data": "nothing.jsonl"}, "does not exist"),
        ([run], {"out": file}, "is a file; name a folder"),
        ([run], {"prose": ["cooking"]}, "--prose=cooking is one domain; give two or more"),
        ([run], {"clusters": 999, "documents": 3}, "999 clusters cannot be made of"),
        ([short], {"with_saturation": True}, "--saturation needs several checkpoints, and"),
    ):
        given = {"data": data, "out": tmp_path / "out", "log": lambda text: None} | options
        with pytest.raises(UserError, match=words):
            explore_models([str(path) for path in models], **given)
    assert not list(tmp_path.glob("out/*"))


def test_names_are_as_long_as_it_takes(tmp_path):
    assert model_names([f"{tmp_path}/a", f"{tmp_path}/b/"]) == ["a", "b"]
    assert model_names([f"{tmp_path}/x/run", f"{tmp_path}/y/run"]) == ["x/run", "y/run"]
    with pytest.raises(UserError, match="names a model twice"):
        model_names([f"{tmp_path}/a", f"{tmp_path}/b/../a"])


def made_up(domains: int, layers: int, experts: int, choices: int, name: str, seed: int = 0):
    """A reading of many layers and domains, and its documents."""
    rng = np.random.default_rng(seed)
    documents = [Text("", f"{'x' * (n % 9)} domain $ {n} <&>") for n in range(domains)] * 3
    document_N = np.repeat(np.arange(len(documents)), 20).astype(np.int32)
    taste_DR = rng.gamma(0.3, size=(domains, experts))
    logits = np.log(taste_DR + 1e-3)[document_N % domains]
    probability_LNR, chosen_LNC = [], []
    for _ in range(layers):
        noisy_NR = np.exp(logits + rng.gumbel(size=logits.shape))
        probability_LNR.append((noisy_NR / noisy_NR.sum(axis=1, keepdims=True)).astype(np.float16))
        chosen_LNC.append(np.argsort(-noisy_NR, axis=1)[:, :choices].astype(np.int16))
    token_N = rng.integers(0, 50, len(document_N)).astype(np.int32)
    return Reading(name, ["t"] * len(token_N), token_N, document_N, probability_LNR, chosen_LNC), documents


def test_figures_hold_a_large_model_beside_a_small_one(tmp_path):
    models = []
    for shape in ((24, 16, 127, 7, "a/run $x$"), (24, 1, 4, 1, "b-" * 40)):
        reading, documents = made_up(*shape)
        prose = {documents[0].domain, documents[1].domain}
        models.append(plain(measure(reading, documents, clusters=5, prose=prose, seed=0)[1]))
    write_figures(tmp_path / "figures", models)
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 6
    file = write_analysis(tmp_path, models, {}, {})
    parsed = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert parsed["models"] == models


def test_numbers_become_what_json_can_hold():
    value = {"a": np.array([1 / 3, np.nan]), "b": (np.int32(4), np.float32(math.inf)), "c": None, 5: [True, "x"]}
    assert plain(value) == {"a": [0.333333, None], "b": [4, None], "c": None, 5: [True, "x"]}
