"""`python -m emo_jax.plan`, as its user meets it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.mains import run_main

CONFIG = "--config=configs/emo_1b14b.py"


@pytest.fixture(scope="module")
def tpu():
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu: pip install 'emo_jax[tpu]'")


def test_the_released_model_on_a_pod_by_formula(tpu, tmp_path):
    out = tmp_path / "plan.json"
    done = run_main("plan", CONFIG, "--topology=v5p:4x4x4", "--compile=0", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "64 chips as fsdp 8 × expert 8" in done.stdout
    assert "of 102.79 GB of HBM: fits" in done.stdout
    assert "238,419 steps" in done.stdout
    assert "libtpu" not in done.stderr.lower(), "nothing of what native code logs"
    (plan,) = json.loads(out.read_text())
    assert plan["fits"]
    assert 0.9 < plan["formula"]["memory"]["arguments"] / 2.55e9 < 1.1


def test_gpus_by_formula_alone(tmp_path):
    done = run_main("plan", CONFIG, "--topology=h200:64")
    assert done.returncode == 0, done.stderr
    assert "by formula" in done.stdout
    refused = run_main("plan", CONFIG, "--topology=h200:64", "--compile=1")
    assert refused.returncode == 2
    assert "--compile=1" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v5x:4x4x4"], "did you mean v5"),
        (["--topology=v5e:2x2", "--compile=0"], "mesh.expert=8 does not divide the 4 devices"),
    ],
)
def test_mistakes_are_answered_with_what_works(tpu, flags, words):
    done = run_main("plan", CONFIG, *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_fit_names_what_does(tpu):
    flags = ["--topology=v5e:8x8", "--compile=0", "--config.model.remat=none", "--config.train.microbatches=1"]
    done = run_main("plan", CONFIG, *flags)
    assert done.returncode == 1
    assert "DOES NOT FIT" in done.stdout
    assert "Nearest that fits, by formula" in done.stdout
    assert "--config." in done.stdout.splitlines()[-1]


def test_a_search_prints_layouts_and_flags(tmp_path):
    out = tmp_path / "plans.json"
    flags = ["--config=configs/emo_tiny.py", "--topology=h200:8", "--search", f"--out={out}"]
    done = run_main("plan", *flags)
    assert done.returncode == 0, done.stderr
    assert "Flags:" in done.stdout
    assert len(json.loads(out.read_text())) > 1


def test_an_interrupted_search_keeps_what_it_has(tpu, tmp_path):
    """Ctrl-C while the first of three layouts is compiled: a table all the same, and nothing goes on running."""
    command = [sys.executable, "-m", "emo_jax.plan", "--config=configs/emo_tiny.py", "--topology=v5e:2x2", "--search"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as program:
        for line in program.stderr:
            if "tracing" in line:
                program.send_signal(signal.SIGINT)
                break
        out, err = program.communicate(timeout=60)
    assert program.returncode == 0, err
    assert "Stopped" in out and "Flags:" in out
    assert not list(tmp_path.glob("emo_jax_plan_*")), "the compiler's folder is gone with it"
