"""How fast a corpus becomes tokens, and in how much memory: `python benchmarks/prepare.py`.

Prepares 30 MB of text of this machine, or of JSON lines, `--path=FILES`, with 1 and 2 workers; then a corpus and one of
20 times its size, for the memory of all processes together at its peak. Rates are of the program's stages, worker start
included, and of a core that is busy: what a worker gives that has one to itself.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import psutil
from _timing import versions
from absl import app, flags

from emo_jax.data import DataConfig, read_documents

_PATH = flags.DEFINE_string("path", "", "JSON lines to prepare; empty: the text of this machine.")
_TIMES = flags.DEFINE_integer("times", 20, "How much larger the larger corpus is.")
_MEGABYTES = flags.DEFINE_float("megabytes", 8.0, "Text of the smaller corpus, in 10^6 bytes.")
_WORKERS = (1, 2)
_UNIT = 0.5  # megabytes: some for the smaller corpus too


def main(_: list[str]) -> None:
    """Prints a line a measurement."""
    print(versions())
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        given_texts = DataConfig(source="jsonl", path=_PATH.value) if _PATH.value else DataConfig()
        path = write_texts(root / "texts.jsonl", (document for document, _ in read_documents(given_texts)), 30e6)
        tokenizer = root / "warm" / "tokenizer.json"
        prepare(path, root / "warm", "--vocab_size=4096", "--workers=1")
        given = (f"--tokenizer={tokenizer}", f"--unit_megabytes={_UNIT}", "--heldout_fraction=0.01")
        for layout in ("array_record", "olmo"):
            for workers in _WORKERS:
                out = root / f"{layout}{workers}"
                lines, _, seconds = prepare(path, out, *given, f"--workers={workers}", f"--format={layout}")
                print(f"\n{layout}, {workers} workers: {seconds:.1f} s in all")
                print("\n".join(f"  {line}" for line in lines if re.search(r" done in .*MB", line)))
        documents = [document for document, _ in read_documents(DataConfig(source="jsonl", path=str(path)))]
        print(f"\n{'workers':>7} {'text':>10} {'peak memory':>12}")
        for workers in _WORKERS:
            for times in (1, _TIMES.value):
                texts = root / "grown.jsonl"
                write_texts(texts, renewed(documents), _MEGABYTES.value * 1e6 * times)
                _, peak, _ = prepare(texts, root / f"grown{workers}-{times}", *given, f"--workers={workers}")
                print(f"{workers:>7} {texts.stat().st_size / 1e6:>7.1f} MB {peak / 1e6:>9,.0f} MB", flush=True)


def prepare(path: pathlib.Path | str, out: pathlib.Path, *more: str) -> tuple[list[str], int, float]:
    """Lines that it printed, bytes of memory that all its processes took at the most, and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "emo_jax.prepare", f"--path={path}", f"--out={out}", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    watcher.join()
    return lines, peak[0], time.perf_counter() - start


def write_texts(path: pathlib.Path, documents, size: float) -> pathlib.Path:
    """Writes JSON lines of about so many bytes."""
    written = 0
    with path.open("w") as file:
        for document in documents:
            written += file.write(json.dumps({"text": document.text, "domain": document.domain}) + "\n")
            if written >= size:
                break
    return path


def renewed(documents):
    """Documents again and again, none equal to another."""
    for turn in range(1 << 30):
        for document in documents:
            yield document._replace(text=f"{turn} {document.text}")


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
            peak[0] = max(peak[0], sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)


if __name__ == "__main__":
    app.run(main)
