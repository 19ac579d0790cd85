"""`python -m emo_jax.train` as its user runs it: to the end, interrupted, killed, and with mistakes."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from emo_jax.training.weights import load_parameters

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "model.vocab_size": 300,
    "model.d_model": 16,
    "model.num_layers": 1,
    "model.num_experts": 8,
    "model.top_k": 3,
    "model.d_expert": 8,
    "pool.max": 8,
    "data.source": "jsonl",
    "data.sequence_length": 32,
    "data.batch_size": 4,
    "optimizer.warmup_steps": 5,
    "train.steps": 60,
    "train.eval_every": 20,
    "train.checkpoint_every": 10,
}
WORDS = {
    "cooking": ("simmer", "the", "onions", "in", "butter", "then", "add", "stock", "salt", "and", "pepper"),
    "sailing": ("the", "skipper", "trims", "a", "sheet", "and", "the", "keel", "bites", "as", "wind", "rises"),
    "law": ("whereas", "the", "party", "of", "the", "first", "part", "shall", "indemnify", "and", "hold"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents of three kinds, as gzipped JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl.gz"
    rng = random.Random(0)
    with gzip.open(path, "wt") as file:
        for _ in range(400):
            domain = rng.choice(sorted(WORDS))
            text = " ".join(rng.choices(WORDS[domain], k=rng.randint(5, 60)))
            file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    return path


def command(workdir, corpus=None, **overrides):
    fields = SMALL | ({"data.path": corpus} if corpus else {}) | overrides
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = ROOT / "configs" / "emo_tiny.py"
    return [sys.executable, "-m", "emo_jax.train", f"--config={config}", f"--workdir={workdir}", *flags]


def environment():
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return variables | {"JAX_PLATFORMS": "cpu"}


def run(*args, **overrides):
    return subprocess.run(command(*args, **overrides), capture_output=True, text=True, env=environment(), timeout=300)


def start(*args, **overrides):
    return subprocess.Popen(
        command(*args, **overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def wait_for_step(workdir, step, seconds=240):
    """Returns once a checkpoint of `step` or later is complete and a few more steps are logged."""
    for _ in range(int(seconds / 0.02)):
        steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
        if steps and max(steps) >= step and len(lines(workdir)) > max(steps):
            return
        time.sleep(0.02)
    raise TimeoutError(f"{workdir} never reached step {step}")


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def metrics(workdir):
    """Logged lines without the clock's share."""
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """A run that nothing disturbed, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole")
    done = run(workdir, corpus)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir, done.stdout


def test_a_run_ends_with_the_loss_of_each_domain_and_a_report(whole):
    workdir, printed = whole
    for domain in WORDS:
        assert domain in printed
    assert f"Report: {workdir / 'report.html'}" in printed
    assert (workdir / "report.html").stat().st_size > 10_000
    assert [line["step"] for line in metrics(workdir)] == list(range(1, 61))
    evaluated = {line["step"]: line["heldout"]["loss"] for line in metrics(workdir) if "heldout" in line}
    assert list(evaluated) == [20, 40, 60]
    assert evaluated[60] < evaluated[20] < np.log(300)
    structure = metrics(workdir)[-1]["heldout"]["structure"]
    assert structure["names"] == sorted(WORDS)
    assert all(0 < share < 1 for share in structure["information"])
    assert list((workdir / "tensorboard").glob("events*"))


def test_killed_and_resumed_is_bit_identical_to_undisturbed(whole, corpus, tmp_path):
    process = start(tmp_path, corpus)
    wait_for_step(tmp_path, 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(lines(tmp_path)) < 60
    resumed = run(tmp_path, corpus)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Continuing from the checkpoint of step" in resumed.stdout
    assert metrics(tmp_path) == metrics(whole[0])
    (_, params, step), (_, wanted, _) = load_parameters(tmp_path), load_parameters(whole[0])
    assert step == 60
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_interrupted_saves_its_step_and_says_how_to_go_on(corpus, tmp_path, sent, status):
    process = start(tmp_path, corpus, **{"train.steps": 100_000, "train.checkpoint_every": 10})
    wait_for_step(tmp_path, 10)
    second = run(tmp_path, corpus, **{"train.steps": 100_000})
    assert second.returncode == 2
    assert f"Another process (process {process.pid}" in second.stderr
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == status
    step = len(lines(tmp_path))
    assert f"Stopped after step {step}. The same command goes on from there." in printed
    assert "Traceback" not in printed
    assert (tmp_path / "checkpoints" / str(step)).is_dir()


def test_a_changed_config_is_refused_with_both_values(whole, corpus):
    done = run(whole[0], corpus, **{"optimizer.learning_rate": 0.5})
    assert done.returncode == 2
    assert "optimizer.learning_rate=0.004, now it is 0.5" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_started_again_only_evaluates(whole, corpus):
    before = metrics(whole[0])
    done = run(*whole[:1], corpus)
    assert done.returncode == 0
    assert metrics(whole[0]) == before
    assert "Held-out loss by domain" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.num_expert": 64}, ["model.num_expert", "model.num_experts"]),
        ({"pool.max": 9}, ["pool.max=9", "8"]),
        ({"model.num_heads": 3}, ["model.num_heads=3", "model.d_model=16"]),
        ({"data.path": "nowhere/*.jsonl"}, ["nowhere/*.jsonl"]),
    ],
)
def test_a_mistake_is_answered_with_advice_and_no_traceback(corpus, tmp_path, overrides, words):
    done = run(tmp_path, corpus, **overrides)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_config_file_that_does_not_exist_names_the_nearest(tmp_path):
    call = [sys.executable, "-m", "emo_jax.train", "--config=configs/emo_tny.py", f"--workdir={tmp_path}"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "Did you mean configs/emo_tiny.py?" in done.stderr


@pytest.mark.parametrize("limit", [12_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_in_words_loses_nothing_and_the_same_command_goes_on(corpus, tmp_path, limit):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    fields = {"train.steps": 20, "model.vocab_size": 300}
    # A process whose files may not grow stands for a disk that is full.
    full = subprocess.run(
        command(tmp_path / "run", corpus, **fields),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        preexec_fn=small_files,
    )
    assert full.returncode == 2, full.stderr[-3000:]
    assert "is full" in full.stderr and "the same command goes on" in full.stderr
    assert "Traceback" not in full.stderr
    done = run(tmp_path / "run", corpus, **fields)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.slow
def test_profiled_steps_leave_a_trace_and_say_where(corpus, tmp_path):
    process = subprocess.run(
        [*command(tmp_path, corpus, **{"train.steps": 8}), "--profile_steps=3:4"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert f"Steps 3 to 4 are profiled: tensorboard --logdir {tmp_path / 'profile'}" in process.stdout
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_what_cannot_be_profiled_is_refused(corpus, tmp_path):
    for steps in ("4:3", "1:100"):
        process = subprocess.run(
            [*command(tmp_path, corpus), f"--profile_steps={steps}"],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=300,
        )
        assert process.returncode == 2
        assert f"--profile_steps='{steps}' must be FIRST:LAST within 1:60" in process.stderr
