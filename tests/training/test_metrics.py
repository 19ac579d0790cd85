"""Where numbers go: what a step says of its data, and Weights & Biases where it is asked for."""

import importlib.util
import json

import numpy as np
import pytest

from emo_jax.errors import UserError
from emo_jax.training.metrics import MetricsLog, check_wandb
from tests.training import tiny


def test_a_step_tells_padding_from_filtered_rows():
    rows = tiny.batch()
    _, metrics = tiny.gradients(tiny.config(model={"dtype": "float32"}), rows)
    empty = sum(tiny.S - sum(lengths) for lengths in tiny.ROWS if lengths)
    assert empty > 0
    np.testing.assert_allclose(metrics["data"]["padding"], empty / rows["tokens"].size, rtol=1e-6)
    np.testing.assert_allclose(metrics["data"]["filtered_rows"], 1 / len(tiny.ROWS), rtol=1e-6)


def test_wandb_is_asked_for_before_any_work():
    check_wandb("")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match=r"train.wandb_project='p' needs the package wandb: pip install 'emo_jax"):
            check_wandb("p")


def test_wandb_gets_each_line_of_one_run_whatever_resumes(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="optional: pip install 'emo_jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny.config(train={"wandb_project": "trial"})
    for start in (0, 2):
        log = MetricsLog(tmp_path, start, config)
        for step in (start + 1, start + 2):
            log.write({"step": step, "loss": 1 / step, "routing": {"dead_experts": [0, 1]}, "alarms": [{"name": "x"}]})
        log.close()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb_id").read_text()
    assert folders and all(f"-{identity}" in folder.name for folder in folders)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
