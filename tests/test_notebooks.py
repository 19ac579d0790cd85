"""The notebooks: what is committed of them, and that each still runs, small, and concludes something."""

import json
import random
import re

import nbformat
import pytest

import emo_jax
from notebooks.execute import FOLDER, ORDER, execute

# Of a machine; warnings; and progress that redraws itself.
UNWANTED = re.compile(r"/(tmp|work|home|root|usr/lib|content)/|site-packages|Warning|Traceback|\r|tokens/s")
SHOWN = {"text/plain", "text/markdown", "image/png"}


@pytest.mark.parametrize("name", ORDER)
def test_committed_outputs_are_whole_small_and_clean(name):
    file = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert file.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "not executed from top to bottom"
    assert "%pip install" in code[0].source and not code[0].outputs
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    outputs = [output for cell in code for output in cell.outputs]
    for output in outputs:
        assert output.output_type in ("stream", "display_data", "execute_result") and output.get("name") != "stderr"
        assert set(output.get("data", {})) <= SHOWN
        assert not UNWANTED.search(words(output)), words(output)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    for link in re.findall(r"\]\((\w+\.ipynb)\)", "".join(cell.source for cell in notebook.cells)):
        assert (FOLDER / link).is_file()


def test_there_are_no_other_notebooks():
    assert sorted(ORDER) == sorted(file.stem for file in FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where notebooks run one after another, with small texts of three domains."""
    folder, draw = tmp_path_factory.mktemp("notebooks"), random.Random(0)
    words = {
        "kitchen": "onion butter pan stir slowly until golden then add the flour and a cup of milk",
        "court": "the party shall not be liable under this clause unless notice is given in writing",
        "sea": "a north wind drove the ship past the cape while the crew lowered every sail",
    }
    texts = [
        {"text": " ".join(draw.choices(line.split(), k=40)), "domain": domain}
        for domain, line in words.items()
        for _ in range(150)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder


def test_quickstart_trains_cuts_and_generates(folder, monkeypatch):
    printed, figures = run("quickstart", folder, monkeypatch, STEPS=2, TEXTS="texts.jsonl", KEEP=(8,), DOCUMENTS=2)
    for name in ("emo", "standard"):
        assert re.search(rf"{name}: 2 steps, held-out loss \d\.\d+ nats", printed)
        assert re.search(rf"{name}: \d\.\d+ nats with all experts.* with a quarter of them [+-]\d\.\d+", printed)
        assert emo_jax.load(folder / "runs" / f"{name}_2").config.num_experts == 32
    assert "parameters with all experts" in printed and "[kitchen] 'the same" in printed
    assert figures == 4


def test_explore_measures_the_models_of_the_quickstart(folder, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*_2/checkpoints/2/*")}
    printed, figures = run(
        "explore", folder, monkeypatch, STEPS=2, TEXTS="texts.jsonl", DOCUMENTS=12, TOKENS=20, CLUSTERS=4
    )
    assert before == {file: file.stat().st_mtime_ns for file in before}, "they were trained again"
    assert re.search(r"I\(expert; domain \| token\) / H\(expert\) +-?0\.\d+ +-?0\.\d+", printed)
    assert len(re.findall(r"beyond the token, experts tell -?\d+\.\d% about the domain", printed)) == 2
    assert "explore.html" in printed and (folder / "runs" / "explore.html").stat().st_size > 100_000
    assert figures == 4


def test_released_checkpoint_cuts_a_stand_in_and_exports_it(tmp_path, monkeypatch):
    printed, figures = run("released_checkpoint", tmp_path, monkeypatch, NEW_TOKENS=4)
    assert "        32       3.90B   15.6 GB    7.8 GB" in printed  # of the released model
    assert "8 of 32 experts a layer stay" in printed and "read back bit for bit" in printed
    assert emo_jax.load(tmp_path / "runs" / "released" / "stand_in_code").config.routed_experts == (7, 7, 7)
    assert figures == 2


def test_how_it_works_ends_where_its_text_says(tmp_path, monkeypatch):
    printed, figures = run("how_it_works", tmp_path, monkeypatch, STEPS=4)
    assert "{'recipe': 5, 'contract': 4, 'program': 8}" in printed
    assert "balanced within each document: 4.00 = n_r / d;  over all of them: 1.00" in printed
    assert len(re.findall(r"error \d\.\d+, subjects use", printed)) == 3
    assert figures == 8


def run(name, folder, monkeypatch, **parameters):
    """What a notebook printed, and how many figures it drew."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setenv("MPLCONFIGDIR", str(folder / "matplotlib"))
    notebook = execute(FOLDER / f"{name}.ipynb", folder, parameters)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(map(words, outputs)), sum("image/png" in output.get("data", {}) for output in outputs)


def words(output):
    """What an output says in text."""
    data = output.get("data", {})
    return output.get("text", "") + data.get("text/plain", "") + data.get("text/markdown", "")
