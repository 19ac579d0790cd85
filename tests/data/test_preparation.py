import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
from collections import Counter

import numpy as np
import pytest
from apache_beam.io.filesystem import FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem
from tokenizers import Tokenizer

from emo_jax.data.config import PrepareConfig
from emo_jax.data.documents import is_heldout
from emo_jax.data.preparation import prepare
from emo_jax.data.shards import folder_name, open_shard
from emo_jax.data.stages import duplicate_line_share
from emo_jax.errors import UserError
from tests.data.conftest import VOCAB_SIZE, write_corpus
from tests.data.test_sources import write_dataset

FRACTION = 0.2


def tree(folder):
    """Every file below a folder, with its bytes."""
    folder = pathlib.Path(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def documents_of(folder, manifest):
    """The text of every training document, by domain."""
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    found = []
    for entry in manifest["shards"]:
        split = open_shard(pathlib.Path(folder), entry, manifest["layout"], 0)
        for start, stop in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            tokens = np.asarray(split.tokens[start:stop]).tolist()
            assert tokens[-1] == manifest["tokenizer"]["end_of_text_id"]
            assert tokens.count(tokens[-1]) == 1
            found.append((entry["domain"], tokenizer.decode(tokens[:-1], skip_special_tokens=False)))
    return found


def heldout_of(folder, manifest):
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokens, offsets = np.fromfile(f"{folder}/heldout.bin", "<u4"), np.load(f"{folder}/heldout_offsets.npy")
    domains = [manifest["domains"][index] for index in np.load(f"{folder}/heldout_domains.npy")]
    return [
        (domain, tokenizer.decode(tokens[a : b - 1].tolist()))
        for domain, a, b in zip(domains, offsets, offsets[1:], strict=False)
    ]


def messy_lines():
    """Documents with copies far apart, short and repetitive ones, several domains."""
    path = pathlib.Path(os.environ.get("TMPDIR", "/tmp"), f"lines-{os.getpid()}")
    lines = [json.loads(line) for line in write_corpus(path).read_text().splitlines()]
    path.unlink()
    lines += lines[::7] + [{"text": "again and again\n" * 9, "domain": "animals"}] * 3
    lines += [{"text": "x", "domain": "stones"}, {"text": "  \n", "domain": "plants"}, {"text": "no domain here " * 9}]
    lines += [{"text": lines[0]["text"], "domain": "stones"}, {"text": "long " * 500, "domain": "plants"}]
    return lines


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messy")
    lines = [json.dumps(line) + "\n" for line in messy_lines()]
    (folder / "a.jsonl").write_text("".join(lines[:150]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[150:200]).encode()))
    (folder / "c.jsonl").write_text("".join(lines[200:]))
    return folder


@pytest.fixture(scope="module")
def config(messy):
    return PrepareConfig(
        path=str(messy),
        vocab_size=VOCAB_SIZE,
        heldout_fraction=FRACTION,
        heldout_documents=5,
        min_characters=10,
        max_characters=2000,
        max_duplicate_lines=0.5,
        unit_megabytes=0.004,
    )


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """The folder of each layout, and its manifest."""
    folder = tmp_path_factory.mktemp("done")
    return {
        layout: (folder / layout, prepare(dataclasses.replace(config, out=str(folder / layout), format=layout)))
        for layout in ("array_record", "olmo")
    }


def expected():
    """What is kept, held out and dropped, by a plain reading of the rules."""
    train, heldout, dropped, seen = [], [], Counter(), set()
    for line in messy_lines():
        text, domain = line["text"], line.get("domain", "text")
        lines = [part.strip() for part in text.split("\n")]
        again = sum(len(part) for place, part in enumerate(lines) if part in lines[:place])
        if not text.strip():
            reason = "blank"
        elif len(text) < 10:
            reason = "short"
        elif len(text) > 2000:
            reason = "long"
        elif again / len("".join(lines)) > 0.5:
            reason = "repetitive"
        elif text in seen:
            reason = "duplicate"
        else:
            reason = ""
        seen.add(text)
        if reason:
            dropped[reason, domain] += 1
        else:
            (heldout if is_heldout(text, FRACTION) else train).append((domain, text))
    return train, heldout, dropped


@pytest.mark.parametrize("layout", ["array_record", "olmo"])
def test_documents_and_counts_are_those_of_a_plain_reading(done, layout):
    folder, manifest = done[layout]
    train, heldout, dropped = expected()
    assert sorted(documents_of(folder, manifest)) == sorted(train)
    for domain in manifest["domains"]:
        own = [text for name, text in train if name == domain]
        count = manifest["train"]["by_domain"][domain]
        assert count["documents"] == len(own)
        assert count["bytes"] == sum(len(text.encode()) for text in own)
    assert manifest["train"]["documents"] == len(train)
    assert {(r, d): n for r, counts in manifest["dropped"].items() for d, n in counts.items()} == dict(dropped)
    assert manifest["heldout"]["kept_out"] == dict(Counter(domain for domain, _ in heldout))
    assert sum(unit["documents"] for unit in manifest["inputs"]) == len(messy_lines())
    assert len(manifest["inputs"]) > 5
    assert manifest["corrupt"] == []
    assert not (folder / ".work").exists()


def test_heldout_documents_have_the_smallest_hashes_of_their_domain(done):
    folder, manifest = done["olmo"]
    _, heldout, _ = expected()
    smallest = []
    for domain in manifest["domains"]:
        own = [text for name, text in heldout if name == domain]
        own.sort(key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
        smallest += [(domain, text) for text in own[:5]]
    assert heldout_of(folder, manifest) == smallest
    assert len(smallest) >= 15


def test_both_layouts_hold_the_same_documents_in_the_same_order(done):
    assert documents_of(*done["array_record"]) == documents_of(*done["olmo"])
    counts = [[entry["tokens"] for entry in manifest["shards"]] for _, manifest in done.values()]
    assert counts[0] == counts[1]


def test_shards_are_bare_arrays_with_a_mix_file_and_checksums(done):
    folder, manifest = done["olmo"]
    mix = [line.split(",") for line in (folder / "mix.txt").read_text().splitlines()]
    assert [path for _, path in mix] == [entry["file"] for entry in manifest["shards"]]
    assert [label for label, _ in mix] == [entry["domain"] for entry in manifest["shards"]]
    for entry in manifest["shards"]:
        data = (folder / entry["file"]).read_bytes()
        assert len(data) == 4 * entry["tokens"]
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        ends = np.flatnonzero(np.frombuffer(data, "<u4") == manifest["tokenizer"]["end_of_text_id"]) + 1
        np.testing.assert_array_equal(np.load(folder / entry["offsets"])[1:], ends)


def test_the_same_settings_give_the_same_bytes_wherever_they_lie(config, messy, done, tmp_path):
    shutil.copytree(messy, tmp_path / "elsewhere")
    again = dataclasses.replace(config, path=str(tmp_path / "elsewhere"), out=str(tmp_path / "out"))
    prepare(again)
    assert tree(tmp_path / "out") == tree(done["array_record"][0])


def test_other_settings_and_another_input_are_refused_with_both_values(config, messy, done):
    out = str(done["array_record"][0])
    lines = []
    assert prepare(dataclasses.replace(config, out=out), log=lines.append) == done["array_record"][1]
    assert lines == [f"{out} is complete; there is nothing to do."]
    with pytest.raises(UserError, match=r"begun with --min_characters=10, this command asks for 11: give what it was"):
        prepare(dataclasses.replace(config, out=out, min_characters=11))
    with (messy / "c.jsonl").open("a") as file:
        file.write("\n")
    try:
        size = (messy / "c.jsonl").stat().st_size
        with pytest.raises(UserError, match=rf"c\.jsonl of --path .*its size was {size - 1}, now {size}\. Put"):
            prepare(dataclasses.replace(config, out=out))
    finally:
        os.truncate(messy / "c.jsonl", size - 1)
    with pytest.raises(UserError, match=r"is not empty: it holds a\.jsonl, b\.jsonl\.gz, c\.jsonl\. Give another"):
        prepare(dataclasses.replace(config, out=str(messy)))


def test_a_file_that_changes_between_the_readings_is_noticed(config, tmp_path):
    path = write_corpus(tmp_path / "a.jsonl")
    config = dataclasses.replace(config, path=str(path), out=str(tmp_path / "out"))

    def log(line):
        if line.startswith("Training a tokenizer"):
            path.write_text(path.read_text().replace("otter", "ottre"))

    with pytest.raises(UserError, match=r"a\.jsonl read differently the second time: \d+ documents with fingerprint"):
        prepare(config, log=log)


@pytest.fixture
def damaged(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = write_corpus(tmp_path / "corpus").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join([*lines[:90], '{"text": "half\n', *lines[90:100]]))
    whole = gzip.compress("".join(lines[100:200]).encode())
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.jsonl").write_text("".join(lines[200:]))
    return folder


def test_what_is_corrupt_stops_by_name_or_is_skipped_and_listed(damaged, tmp_path):
    config = PrepareConfig(path=str(damaged), out=str(tmp_path / "out"), vocab_size=VOCAB_SIZE, unit_megabytes=0.004)
    with pytest.raises(UserError, match=r"a\.jsonl:91 is not JSON .*or give --on_corrupt=skip|b\.jsonl\.gz is damaged"):
        prepare(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    lines = []
    manifest = prepare(dataclasses.replace(config, on_corrupt="skip"), log=lines.append)  # goes on
    assert [(entry["file"], entry["line"]) for entry in manifest["corrupt"]] == [("a.jsonl", 91), ("b.jsonl.gz", 0)]
    assert "is not JSON" in manifest["corrupt"][0]["reason"]
    assert "is damaged" in manifest["corrupt"][1]["reason"]
    assert [line.split(": ")[0] for line in lines if "Skipped" in line] == ["Skipped a.jsonl:91", "Skipped b.jsonl.gz"]
    kept = manifest["train"]["documents"] + sum(manifest["heldout"]["kept_out"].values())
    assert kept == 100 + 40
    fresh = dataclasses.replace(config, on_corrupt="skip", out=str(tmp_path / "fresh"))
    prepare(fresh)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_text_files_in_another_encoding_are_skipped_singly(tmp_path):
    folder = tmp_path / "in"
    for name in ("law/a.txt", "law/b.txt", "poems/c.txt", "d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"text of {name}".encode())
    (folder / "law" / "b.txt").write_bytes("café".encode("latin-1"))
    config = PrepareConfig(
        source="text", path=str(folder), out=str(tmp_path / "out"), vocab_size=300, heldout_fraction=1e-9
    )
    with pytest.raises(UserError, match=r"law/b\.txt is not UTF-8"):
        prepare(config)
    manifest = prepare(dataclasses.replace(config, on_corrupt="skip"))
    assert sorted(documents_of(config.out, manifest)) == [
        ("law", "text of law/a.txt"),
        ("poems", "text of poems/c.txt"),
        ("text", "text of d.txt"),
    ]
    assert [entry["file"] for entry in manifest["corrupt"]] == ["law/b.txt"]


def test_a_tensorflow_dataset_is_read_in_ranges(tmp_path):
    texts = [f"example number {number} of some" for number in range(60)]
    folder = write_dataset(tmp_path, [{"text": text, "domain": "tens"} for text in texts])
    config = PrepareConfig(
        source="tfds",
        path=str(folder),
        out=str(tmp_path / "out"),
        vocab_size=300,
        heldout_fraction=1e-9,
        unit_megabytes=0.001,
    )
    manifest = prepare(config)
    assert len(manifest["inputs"]) > 2
    assert documents_of(config.out, manifest) == [("tens", text) for text in texts]


def test_long_documents_and_large_units_are_written_in_parts(tmp_path):
    texts = ["a line of a long book\n" * 200_000, *(f"{number} " * 400 for number in range(60))]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    config = PrepareConfig(
        path=str(tmp_path / "a.jsonl.gz"),
        out=str(tmp_path / "out"),
        vocab_size=400,
        heldout_fraction=1e-9,
        unit_megabytes=0.02,
    )
    manifest = prepare(config)
    assert len(manifest["inputs"]) == 1
    assert len(manifest["shards"]) > 4
    assert documents_of(config.out, manifest) == [("text", text) for text in texts]


class _Elsewhere(LocalFileSystem):
    """A file system of Beam with a scheme: `elsewhere://x/y` is the file `/x/y`."""

    @classmethod
    def scheme(cls):
        return "elsewhere"

    def _list(self, dir_or_prefix):
        for metadata in super()._list(_local(dir_or_prefix)):
            yield FileMetadata(f"elsewhere:/{metadata.path}", metadata.size_in_bytes)

    def _path_open(self, path, *args, **kwargs):
        return super()._path_open(_local(path), *args, **kwargs)

    def create(self, path, *args, **kwargs):
        os.makedirs(os.path.dirname(_local(path)), exist_ok=True)
        return self._path_open(path, "wb", *args, **kwargs)

    def exists(self, path):
        return super().exists(_local(path))

    def metadata(self, path):
        return FileMetadata(path, os.path.getsize(_local(path)))

    def delete(self, paths):
        for path in paths:
            os.remove(_local(path))


def _local(path):
    return path.replace("elsewhere:/", "", 1)


def test_input_and_result_may_lie_on_another_file_system(config, messy, done, tmp_path):
    lines = []
    remote = dataclasses.replace(config, path=f"elsewhere:/{messy}", out=f"elsewhere:/{tmp_path}/out")
    prepare(remote, log=lines.append)
    found = {name: data for name, data in tree(tmp_path / "out").items() if not name.startswith(".work/")}
    assert found == tree(done["array_record"][0])
    assert not any(name.startswith(".work/") for name in tree(tmp_path / "out"))
    prepare(remote, log=lines.append)
    assert lines[-1].endswith("is complete; there is nothing to do.")
    with pytest.raises(UserError, match="holds no files"):
        prepare(dataclasses.replace(remote, path=f"elsewhere:/{messy}/*.none", out=f"elsewhere:/{tmp_path}/none"))


def test_domains_become_names_of_folders():
    names = ["law", "a/b", "..", ".hidden", "a,b", "Ä", "x" * 300, "x" * 301, "a%2Fb"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[0] == "law"
    for folder in folders:
        assert len(folder) < 200
        assert not set(folder) & set("/, ")
        assert not folder.startswith(".")


def test_share_of_repeated_lines_counts_characters():
    assert duplicate_line_share("") == duplicate_line_share("one\ntwo") == 0
    assert duplicate_line_share("ab\nab\n\n\ncdef") == 2 / 8
    assert duplicate_line_share(" ab \nab") == 1 / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "json"}, r"--source='json' is not one of .*Did you mean 'jsonl'"),
        ({"path": ""}, "--path is empty"),
        ({"out": ""}, "--out is empty"),
        ({"format": "npy"}, "--format='npy' is not one of"),
        ({"end_of_text": ""}, "--end_of_text is empty"),
        ({"heldout_fraction": 0.0}, r"--heldout_fraction=0\.0 must lie between"),
        ({"max_characters": 5, "min_characters": 6}, "--max_characters=5 must be at least --min_characters=6"),
        ({"max_duplicate_lines": 1.5}, r"--max_duplicate_lines=1\.5 is a share"),
        ({"unit_megabytes": 0.0}, r"--unit_megabytes=0\.0 must be positive"),
        ({"source": "olmo"}, "--source=olmo needs --tokenizer"),
        ({"source": "olmo", "dedup": False}, "--dedup=False does nothing with --source=olmo; leave it out"),
        ({"token_type": "uint16"}, "--token_type=uint16 does nothing with --source=jsonl"),
        ({"tokenizer": "nowhere.json"}, "--tokenizer='nowhere.json' is not a file"),
        ({"vocab_size": 10}, "--vocab_size=10 is too small to train a tokenizer"),
        ({"min_characters": 10**6}, "holds no document that the filters keep"),
    ],
)
def test_what_cannot_work_is_refused(corpus, tmp_path, change, message):
    config = PrepareConfig(path=str(corpus), out=str(tmp_path / "out"), vocab_size=VOCAB_SIZE)
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(config, **change))
