"""Hugging Face folders become saved models and come back bit for bit, whatever happens in between."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

import emo_jax
from emo_jax.errors import UserError
from emo_jax.interop import read_config, read_parameters
from emo_jax.modularity import Subset
from emo_jax.training.conversion import export_folder, import_folder
from emo_jax.training.weights import load_parameters, saved_fingerprint
from tests.interop.folders import SMALL, VARIANTS, tensors_of, write
from tests.interop.goldens import GOLDEN, MODELS, needs_golden

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
ROWS = SMALL["vocab_size"]


class Stopped(Exception):
    """What a user's Ctrl-C is to these tests."""


def published(folder, change=None, dtype="float32", ids=0):
    """A folder as others publish it, with a tokenizer of so many ids, if any."""
    values = SMALL | {"torch_dtype": dtype, "eos_token_id": 1, "max_position_embeddings": 77} | (change or {})
    tensors = tensors_of(values, dtype=DTYPES[dtype])
    for name, value in tensors.items():
        if name.endswith("mlp.gate.weight") and values["num_shared_experts"] > 1:
            value[-1] = value[-2]  # equal rows of shared experts, and not zero
    write(folder, values, tensors)
    (folder / "modeling.py").write_text("# code of the model\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    if ids:
        Tokenizer(models.WordLevel({f"<{i}>": i for i in range(ids)}, "<0>")).save(str(folder / "tokenizer.json"))
    return folder


def assert_same_folder(found, wanted):
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    for path in wanted.iterdir():
        if path.suffix == ".safetensors":
            assert_bits(load_file(found / path.name), load_file(path))
        elif path.name == "config.json":
            assert json.loads((found / path.name).read_text()) == json.loads(path.read_text())
        else:
            assert (found / path.name).read_bytes() == path.read_bytes()


def assert_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def by_name(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def subset_of(folder, experts, file):
    file.write_text(Subset(experts, saved_fingerprint(folder)).to_json())
    return file


@pytest.mark.parametrize(
    ("name", "dtype", "ids", "rows"),
    [
        ("one shared expert", "bfloat16", 9, 0),  # cropped
        ("one shared expert", "float16", 14, 0),  # padded
        ("two shared", "bfloat16", 0, 0),
        ("a dense layer", "float32", ROWS, 0),
        ("olmoe", "bfloat16", 0, 20),
        ("always active", "float16", 0, 5),
        ("tied llama", "bfloat16", 9, 0),
        ("llama classifier", "bfloat16", 9, 0),
        ("gpt2", "float32", 14, 0),
        ("gpt2 classifier", "float16", 9, 0),
        ("bert", "bfloat16", 9, 0),
        ("bert classifier", "float32", 14, 0),
    ],
)
def test_export_undoes_import_bit_for_bit(tmp_path, name, dtype, ids, rows):
    source = published(tmp_path / "source", VARIANTS[name], dtype, ids)
    said, told = [], []
    import_folder(
        source,
        tmp_path / "model",
        vocab_rows=rows,
        log=said.append,
        progress=lambda done, total: told.append((done, total)),
    )
    config, params, step = load_parameters(tmp_path / "model")
    held = rows or ids or ROWS
    assert step == 0 and config.model.vocab_size == held and config.data.end_of_text == ("<1>" if ids else "")
    wanted = by_name(read_parameters(source, read_config(source)))
    pad = max(held - ROWS, 0)
    wanted["embedding"] = np.pad(wanted["embedding"], ((0, pad), (0, 0)))[:held]
    if "head" in wanted:
        wanted["head"] = np.pad(wanted["head"], ((0, 0), (0, pad)))[:, :held]
    assert_bits(by_name(params), wanted)
    size = sum(leaf.nbytes for leaf in wanted.values())
    assert told[0] == (0, size) and told[-1] == (size, size) and len(told) == len(wanted) + 1
    changes = {True: f"The vocabulary's {ROWS} rows are cropped to {held}.", False: f"are padded with zeros to {held}."}
    assert len(said) == (held != ROWS) and (not said or changes[held < ROWS] in said[0])

    export_folder(tmp_path / "model", tmp_path / "again")
    assert_same_folder(tmp_path / "again", source)


def test_orbax_restores_what_was_imported_and_a_model_computes_with_it(tmp_path):
    source = published(tmp_path / "source", dtype="bfloat16", ids=9)
    import_folder(source, tmp_path / "model")
    with ocp.CheckpointManager(tmp_path / "model" / "checkpoints") as manager:
        saved = manager.restore(
            0, args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        )
    assert_bits(by_name(saved["state"]["params"]), by_name(load_parameters(tmp_path / "model")[1]))
    assert saved["meta"]["content"]["vocabulary_rows"] == ROWS
    tokens = np.arange(8).reshape(1, -1)
    model = emo_jax.load(tmp_path / "model")
    assert model.end_of_text == "<1>"
    np.testing.assert_array_equal(model(tokens), emo_jax.load(source)(tokens)[..., :9])


def test_a_subset_is_the_same_however_it_is_cut(tmp_path):
    source = published(tmp_path / "source", ids=9)
    subset = subset_of(source, ((1, 3), (0, 2, 3)), tmp_path / "subset.json")
    import_folder(source, tmp_path / "whole", log=lambda text: None)
    import_folder(source, tmp_path / "cut", subset=subset, log=lambda text: None)
    wanted = emo_jax.load(source).cut(subset)
    found = by_name(load_parameters(tmp_path / "cut")[1])
    expected = by_name(wanted.params)
    expected |= {"embedding": expected["embedding"][:9], "head": expected["head"][:, :9]}
    assert_bits(found, expected)
    exports = {"whole": subset, "cut": None, "source": subset}
    for name, chosen in exports.items():
        export_folder(tmp_path / name, tmp_path / f"of {name}", subset=chosen)
    assert_same_folder(tmp_path / "of cut", tmp_path / "of whole")
    assert_same_folder(tmp_path / "of source", tmp_path / "of whole")
    again = emo_jax.load(tmp_path / "of whole")
    assert again.config == wanted.config
    assert_bits(by_name(again.params), by_name(wanted.params))
    with pytest.raises(UserError, match="The subset was chosen for the model"):
        import_folder(published(tmp_path / "other", VARIANTS["none shared"]), tmp_path / "new", subset=subset)


@needs_golden
@pytest.mark.parametrize("name", MODELS)
def test_golden_models_come_back_and_compute_what_they_did(tmp_path, name):
    import_folder(GOLDEN / name, tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "again")
    assert_bits(load_file(tmp_path / "again" / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors"))
    config = read_config(GOLDEN / name)
    assert load_parameters(tmp_path / "model")[0].model == config
    expected, model = load_file(GOLDEN / name / "expected.safetensors"), emo_jax.load(tmp_path / "model")
    np.testing.assert_allclose(model(expected["input_ids"]), expected["logits"], rtol=0, atol=3e-5)
    written = model.generate(expected["generated"][:, :8].tolist(), max_new_tokens=12)
    np.testing.assert_array_equal([completion.tokens for completion in written], expected["generated"][:, 8:])
    assert_bits(by_name(load_parameters(tmp_path / "model")[1]), by_name(read_parameters(GOLDEN / name, config)))


def test_stopped_after_every_parameter_it_goes_on_and_reads_no_other_again(tmp_path):
    source = published(tmp_path / "source", dtype="bfloat16", ids=9)
    import_folder(source, tmp_path / "wanted", log=lambda text: None)
    parameters = len(by_name(load_parameters(tmp_path / "wanted")[1]))
    file, times = source / "model.safetensors", os.stat(source / "model.safetensors")

    def stop(done, total):
        calls.append(done)
        if len(calls) == 2:
            raise Stopped

    for number in range(parameters):
        calls, said = [], []
        with pytest.raises(Stopped):
            import_folder(source, tmp_path / "model", log=said.append, progress=stop)
        assert not (tmp_path / "model").exists()
        assert any(f"{number} of {parameters} parameters are there already" in line for line in said) == (number > 0)
        if number == 1:  # two are done, the largest: the embedding and the head, or a stack of experts
            largest = json.loads((tmp_path / ".model.saving" / "journal.jsonl").read_text().splitlines()[1])["leaf"]
            assert largest.startswith("params/layers/00/moe/routed/")
            overwrite(file, "model.layers.0.mlp.experts.0.gate_proj.weight", 0xFF)  # NaN: refused where it is read
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    import_folder(source, tmp_path / "model", log=lambda text: None)
    assert_bits(by_name(load_parameters(tmp_path / "model")[1]), by_name(load_parameters(tmp_path / "wanted")[1]))
    assert not (tmp_path / ".model.saving").exists() and not (tmp_path / "model" / "journal.jsonl").exists()


def overwrite(file, tensor, byte):
    """Replaces a tensor in place by bytes that are all the same."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + start : 8 + length + end] = bytes([byte]) * (end - start)
    file.write_bytes(content)


KILLED = """
import os, signal, sys
from pathlib import Path
from emo_jax.training.conversion import import_folder
calls = []
def kill(done, total):
    calls.append(done)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
import_folder(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""


def test_a_killed_process_is_gone_on_with_and_only_by_the_same_command(tmp_path):
    source = published(tmp_path / "source", ids=9)
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "model")]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    shutil.copytree(tmp_path / ".model.saving", tmp_path / ".other.saving")
    shutil.copytree(tmp_path / ".model.saving", tmp_path / ".touched.saving")
    said = []
    import_folder(source, tmp_path / "other", vocab_rows=10, log=said.append)
    assert not any("interrupted" in line for line in said)
    import_folder(source, tmp_path / "model", log=said.append)
    assert any("4 of" in line for line in said)
    os.utime(source / "model.safetensors")
    said.clear()
    import_folder(source, tmp_path / "touched", log=said.append)
    assert not any("interrupted" in line for line in said)
    wanted = by_name(load_parameters(tmp_path / "touched")[1])
    assert_bits(by_name(load_parameters(tmp_path / "model")[1]), wanted)
    export_folder(tmp_path / "other", tmp_path / "again")
    assert_same_folder(tmp_path / "again", source)


def test_damage_to_what_was_imported_is_noticed(tmp_path):
    source = published(tmp_path / "source", ids=9)
    import_folder(source, tmp_path / "model", log=lambda text: None)
    wanted, noticed = by_name(load_parameters(tmp_path / "model")[1]), 0
    state = tmp_path / "model" / "checkpoints" / "0"
    by_size = sorted((path for path in state.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    for file in [*by_size[:6], state / "state" / "manifest.ocdbt", state / "meta" / "metadata"]:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0xFF
        for damaged in (bytes(flipped), content[: len(content) // 2], b""):
            file.write_bytes(damaged)
            try:
                assert_bits(by_name(load_parameters(tmp_path / "model")[1]), wanted)
            except UserError as error:
                noticed += 1
                assert "is damaged" in str(error) and "Make it again, or" in str(error)
        file.write_bytes(content)
    assert noticed >= 12
    file = tmp_path / "model" / "source" / "left_out" / "head.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError, match="is damaged"):
            export_folder(tmp_path / "model", tmp_path / "again")
        file.unlink(missing_ok=True)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    source = published(tmp_path / "source", ids=9)
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    import_folder(source, tmp_path / "model", log=lambda text: None)
    attempts = {
        "exists already": lambda: import_folder(source, full),
        "has no config.json: it holds no model": lambda: import_folder(full, tmp_path / "new"),
        "not a Hugging Face folder": lambda: import_folder(tmp_path / "model", tmp_path / "new"),
        r"vocab_rows=5 leaves tokens without a row.*give at least 9": lambda: import_folder(
            source, tmp_path / "new", vocab_rows=5
        ),
        "dtype='float8' is not one of": lambda: export_folder(source, tmp_path / "new", dtype="float8"),
        "There is no subset file": lambda: export_folder(source, tmp_path / "new", subset=tmp_path / "missing"),
        "exists already; give another": lambda: export_folder(source, full),
    }
    for message, attempt in attempts.items():
        with pytest.raises(UserError, match=message):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model", "source"]


def test_float16_that_would_overflow_is_refused(tmp_path):
    values = SMALL | {"torch_dtype": "float32"}
    tensors = tensors_of(values)
    tensors["model.norm.weight"][3] = 1e5
    write(tmp_path / "source", values, tensors)
    with pytest.raises(UserError, match="final_norm has values beyond the range of float16"):
        export_folder(tmp_path / "source", tmp_path / "new", dtype="float16")
    assert not (tmp_path / "new").exists()
    export_folder(tmp_path / "source", tmp_path / "new", dtype="bfloat16")
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert_bits(found, {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
