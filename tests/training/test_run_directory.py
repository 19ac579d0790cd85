"""A run in a bucket, against a storage server on this machine that speaks Google's protocol."""

import json
import signal
import subprocess
import sys

import pytest

from emo_jax.errors import UserError
from emo_jax.training.run_directory import RunDirectory
from tests.test_train import command, corpus, environment, metrics, run  # noqa: F401 (corpus is a fixture)


@pytest.fixture(scope="module")
def bucket():
    """Variables that lead Orbax's and our own requests to the server."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.training.bucket"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    # No look for credentials: there is no metadata server to answer.
    nobody = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true"}
    yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address} | nobody
    server.terminate()


def in_bucket(bucket, cache, corpus, **overrides):  # noqa: F811
    return subprocess.Popen(
        command("gs://runs/tiny", corpus, **overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | bucket | {"XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_from_another_host(bucket, corpus, tmp_path):  # noqa: F811
    fields = {"train.steps": 30, "train.eval_every": 30}
    reference = run(tmp_path / "folder", corpus, **fields)
    assert reference.returncode == 0
    first = in_bucket(bucket, tmp_path / "first", corpus, **fields)
    cached = tmp_path / "first" / "emo_jax" / "runs" / "runs" / "tiny"
    for _ in iter(lambda: len(metrics(cached)) < 15, False):
        assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert "Stopped after step" in first.communicate(timeout=120)[0]
    second = in_bucket(bucket, tmp_path / "second", corpus, **fields)
    printed = second.communicate(timeout=120)[0]
    assert second.returncode == 0, printed
    assert "Continuing from the checkpoint of step" in printed
    assert "Report: gs://runs/tiny/report.html" in printed
    script = "from etils import epath; print(epath.Path('gs://runs/tiny/metrics.jsonl').read_text())"
    shown = subprocess.run(
        [sys.executable, "-c", script], env=environment() | bucket, capture_output=True, text=True, timeout=60
    ).stdout
    sent = [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in shown.split("\n") if line]
    assert sent == metrics(tmp_path / "folder")


def test_the_newer_job_has_the_run_and_the_older_one_learns_it(bucket, monkeypatch, tmp_path):
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    older, newer = RunDirectory("gs://runs/taken"), RunDirectory("gs://runs/taken")
    with older.held():
        (older.local / "metrics.jsonl").write_text("1\n")
        older.send()
        assert (older.home / "metrics.jsonl").read_text() == "1\n"
        with newer.held():
            (newer.local / "metrics.jsonl").write_text("2\n")
            newer.send()
            with pytest.raises(UserError, match="Another job"):
                older.send()
    assert (older.home / "metrics.jsonl").read_text() == "2\n"


@pytest.mark.parametrize(
    ("name", "words"), [("s3://bucket/run", "gs://BUCKET/NAME"), ("gs://bucket", "needs a name behind its bucket")]
)
def test_other_addresses_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        RunDirectory(name)
