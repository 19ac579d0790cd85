"""The preparation as its user runs it: its processes, its kills, its memory."""

import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.mains import run_main, small_run

WORDS = "the of and a to in is that for it as was with be by on not he his but at are this have from or had an they"
CORPORA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "corpora"


def write_texts(path, megabytes, seed=0):
    """About so much text in lines of JSON, of three domains, with some copies."""
    rng = random.Random(seed)
    words = [word + ending for word in WORDS.split() for ending in ("", "s", "ing", "ed")]
    size, kept = 0, []
    with path.open("w") as file:
        while size < megabytes * 1e6:
            text = rng.choice(kept) if kept and rng.random() < 0.05 else " ".join(rng.choices(words, k=300))
            kept = [*kept[-50:], text]
            size += file.write(json.dumps({"text": text, "domain": rng.choice(["one", "two", "three"])}) + "\n")
    return path


def tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_texts(folder / "a.jsonl", 2)
    write_texts(folder / "b.jsonl", 0.3, seed=1)
    lines = write_texts(folder / "rest", 0.3, seed=2)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes() + (folder / "b.jsonl").read_bytes()))
    lines.unlink()
    return folder


def flags(corpus, out, *more):
    common = ("--vocab_size=600", "--heldout_fraction=0.02", "--unit_megabytes=0.1")
    return (f"--path={corpus}", f"--out={out}", *common, *more)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What an undisturbed run on one worker leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run_main("prepare", *flags(corpus, out))
    assert done.returncode == 0, done.stderr
    assert "all" in done.stdout
    assert "duplicate" in done.stdout
    assert f"--config.data.source=tokens --config.data.path={out}" in done.stdout
    assert not done.stderr.strip()
    return tree(out)


def test_four_workers_leave_the_same_bytes_as_one_and_nothing_else(corpus, whole, tmp_path):
    done = run_main("prepare", *flags(corpus, tmp_path / "out", "--workers=4"))
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    assert tree(tmp_path / "out") == whole
    assert sorted(name for name in os.listdir(tmp_path)) == [".out.lock", "out"]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "emo_jax.prepare", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it was killed: the corpus is too small"
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("stage", ["scan", "tokenize"])
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(corpus, whole, tmp_path, stage):
    out = tmp_path / "out"
    process = start(*flags(corpus, out, "--workers=2"))
    finished = out / ".work" / stage
    try:
        wait_for(lambda: len(list(finished.glob("*.json"))) >= 4, process)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert workers
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left
    done = {file: file.stat().st_mtime_ns for file in finished.glob("*.json")}
    assert not (out / "manifest.json").exists()
    shards = [entry["file"] for file in done for entry in json.loads(file.read_text()).get("shards", [])]
    before = {name: (out / name).stat().st_mtime_ns for name in shards}
    again = run_main("prepare", *flags(corpus, out))
    assert again.returncode == 0, again.stderr
    assert f"{stage}: {len(done)} of " in again.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == before
    assert (stage == "tokenize") == bool(shards)
    assert tree(out) == whole


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--max_charcters=3",
            "There is no flag --max_charcters, neither here nor in Apache Beam. Did you mean --max_c",
        ),
        ("--nodedup --vocab_size=3", "--vocab_size=3 is too small"),
    ],
)
def test_mistakes_are_answered_in_one_line(corpus, tmp_path, flag, message):
    done = run_main("prepare", f"--path={corpus / 'b.jsonl'}", f"--out={tmp_path / 'out'}", *flag.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_beams_own_flags_reach_it(corpus, whole, tmp_path):
    own = ("--direct_num_workers", "2", "--direct_running_mode=multi_threading")
    done = run_main("prepare", *flags(corpus, tmp_path / "out", *own))
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == whole


def peak_memory(*arguments):
    """Bytes of resident memory at the most, of all processes of a preparation together."""
    process = start(*arguments)
    peak = 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_corpus(tmp_path, compressed):
    peaks = []
    tokenizer = tmp_path / "small" / "tokenizer.json"
    for times in (1, 20):
        path = write_texts(tmp_path / f"{times}.jsonl", 4 * times, seed=times)
        if compressed:
            packed = path.with_name(f"{path.name}.gz")
            packed.write_bytes(gzip.compress(path.read_bytes(), 1))
            path = packed
        if not tokenizer.exists():
            assert run_main("prepare", *flags(path, tokenizer.parent)).returncode == 0
        given = (f"--tokenizer={tokenizer}", "--unit_megabytes=0.25")
        peaks.append(peak_memory(f"--path={path}", f"--out={tmp_path / f'out{times}'}", *given))
    print(peaks)
    assert peaks[1] < 1.15 * peaks[0]


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.is_dir(), reason="needs ../shared/corpora")
@pytest.mark.parametrize("layout", ["array_record", "olmo"])
def test_the_shared_corpus_gives_the_same_bytes_on_one_and_four_workers_and_after_a_kill(tmp_path, layout):
    given = (f"--path={CORPORA}", "--vocab_size=1024", f"--format={layout}")
    for name, more in (("one", ()), ("four", ("--workers=4",))):
        done = run_main("prepare", *given, f"--out={tmp_path / name}", *more)
        assert done.returncode == 0, done.stderr
    process = start(*given, f"--out={tmp_path / 'killed'}", "--workers=4")
    wait_for(lambda: list((tmp_path / "killed").glob(".work/tokenize/*.json")), process)
    process.kill()
    process.wait()
    assert run_main("prepare", *given, f"--out={tmp_path / 'killed'}", "--workers=4").returncode == 0
    assert tree(tmp_path / "four") == tree(tmp_path / "one") == tree(tmp_path / "killed")


def test_a_run_trains_on_prepared_shards_and_is_evaluated(corpus, tmp_path):
    from emo_jax.api import load
    from emo_jax.data import DataConfig
    from emo_jax.data.config import PrepareConfig
    from emo_jax.data.preparation import prepare
    from emo_jax.modularity.evaluation import Texts
    from emo_jax.training import train

    out, run = tmp_path / "prepared", tmp_path / "run"
    prepare(PrepareConfig(path=str(corpus), out=str(out), vocab_size=300, heldout_fraction=0.02))
    config = small_run(corpus, steps=4)
    config.data = DataConfig(source="tokens", path=str(out), sequence_length=32, batch_size=8)
    assert train(config, run).heldout.all.tokens > 1000
    assert [file.name for file in (run / "data").glob("*.bin")] == ["heldout.bin"]  # tokens stay where they are
    texts = Texts(load(str(run)), run)
    batches, sizes = texts.test(2)
    assert set(batches) == set(sizes) == {"one", "two", "three"}
    assert set(texts.calibration(3)) == {"one", "two", "three"}
