"""The public API as its user meets it: load a folder, call the model."""

import contextlib
import json
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import emo_jax
from emo_jax.config import Config
from emo_jax.errors import UserError
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.parallel import make_mesh
from emo_jax.training.checkpoints import Checkpoints
from emo_jax.training.step import init_state
from tests.interop.goldens import GOLDEN, needs_golden

SMALL = ModelConfig(
    vocab_size=13, d_model=8, num_layers=2, num_heads=2, num_experts=5, top_k=3, d_expert=6, dtype="float32"
)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_parameters(SMALL))
    return emo_jax.Model(SMALL, params)


@needs_golden
def test_a_hugging_face_folder_gives_the_public_logits():
    expected = load_file(GOLDEN / "emo_pruned" / "expected.safetensors")
    loaded = emo_jax.load(GOLDEN / "emo_pruned")
    assert isinstance(loaded, emo_jax.Model) and loaded.config.experts_per_layer == (6, 9)
    logits_BSV = loaded(expected["input_ids"])
    assert logits_BSV.dtype == np.float32
    np.testing.assert_allclose(logits_BSV, expected["logits"], rtol=0, atol=3e-5)


def test_documents_of_a_row_are_computed_as_if_alone(model):
    tokens_BS = np.random.default_rng(0).integers(0, 13, (2, 12))
    ids_BS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0, 0] + [3] * 3 + [1] * 7])
    together_BSV = model(tokens_BS, ids_BS)
    for row, start, end in [(0, 0, 5), (0, 5, 9), (1, 2, 5), (1, 5, 12)]:
        alone = np.zeros((2, 12), int)  # the same shape, so that it compiles once
        alone[0, : end - start] = tokens_BS[row, start:end]
        expected_SV = model(alone)[0, : end - start]
        np.testing.assert_allclose(together_BSV[row, start:end], expected_SV, rtol=1e-4, atol=1e-6)
    assert np.isfinite(together_BSV).all()


def test_without_document_ids_each_row_is_one_document(model):
    tokens_BS = np.random.default_rng(1).integers(0, 13, (2, 12))
    np.testing.assert_array_equal(model(tokens_BS), model(jax.numpy.asarray(tokens_BS), np.ones((2, 12), int)))


def test_a_shape_is_compiled_once(model):
    tokens_BS = np.zeros((2, 12), np.uint16)
    model(tokens_BS)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("emo_jax.api.bind", lambda *_: pytest.fail("traced again"))
        model(tokens_BS + 1)


def test_bad_calls_are_refused_in_words(model):
    for tokens, ids, words in [
        ([1, 2], None, r"tokens must be integers of shape \[rows, sequence\]; found int64 of shape \[2\]"),
        ([[0.5]], None, "tokens must be integers"),
        ([[1, 13]], None, r"0\.\.12 \(the vocabulary\); found 13"),
        ([[1, -1]], None, "found -1"),
        ([[1, 2]], [[1]], r"document_ids has shape \[1, 1\], tokens \[1, 2\]"),
        ([[1, 2, 3]], [[1, 2, 1]], "row 0 has a document in several pieces"),
        ([[1, 2]], [[-1, 1]], "must not be negative; found -1"),
    ]:
        with pytest.raises(UserError, match=words):
            model(tokens, ids)


def test_a_run_directory_gives_its_newest_parameters(tmp_path, model):
    run = Config(model=SMALL)
    (tmp_path / "config.json").write_text(run.to_json())
    state = init_state(run, make_mesh(run.mesh, run.data.batch_size, jax.devices()[:1]))
    with contextlib.closing(Checkpoints(tmp_path, run, "hash")) as checkpoints:
        for step, factor in [(3, 0.0), (7, 1.0)]:
            params = jax.tree.map(lambda x, factor=factor: x * factor, model.params)
            batches = iter(grain.MapDataset.range(1).to_iter_dataset())
            checkpoints.save(state._replace(step=jax.numpy.int32(step), params=params), batches)
    loaded = emo_jax.load(str(tmp_path))
    assert loaded.config == SMALL
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_anything_else_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder; looked for a Hugging Face folder .* run directory"):
        emo_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json; looked for"):
        emo_jax.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"layers": 3}))
    with pytest.raises(UserError, match="neither 'model_type' nor 'model'"):
        emo_jax.load(tmp_path)


def test_importing_a_part_does_not_import_everything():
    code = "import sys, emo_jax.errors; assert emo_jax.__version__; print('jax' in sys.modules, emo_jax.load.__name__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "load"]
