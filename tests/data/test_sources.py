import gzip
import json

import pytest
import zstandard

from emo_jax.data import DataConfig, read_documents
from emo_jax.errors import UserError

LINES = [{"text": "one"}, {"text": "two", "domain": "d"}, {"text": "žluť", "domain": "d"}]
EXPECTED = [("one", "text"), ("two", "d"), ("žluť", "d")]


def encoded(lines=LINES):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def read(source, path):
    return list(read_documents(DataConfig(source=source, path=str(path))))


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("a.json.zst", lambda data: b"".join(map(zstandard.ZstdCompressor().compress, (data[:9], data[9:])))),
    ],
)
def test_jsonl_reads_plain_and_compressed_files(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(encoded()))
    assert read("jsonl", tmp_path / name) == EXPECTED


def test_jsonl_folder_and_glob_read_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_bytes(encoded(LINES[1:2]))
    (tmp_path / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(encoded(LINES[2:])))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + encoded(LINES[:1]) + b"\n")
    (tmp_path / "notes.txt").write_text("not read")
    assert read("jsonl", tmp_path) == EXPECTED
    assert read("jsonl", tmp_path / "*.jsonl") == EXPECTED[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', r"a\.jsonl:2 is not JSON"),
        (b'["text"]', r"a\.jsonl:2 is not a JSON object"),
        (b'{"content": "x"}', r"a\.jsonl:2 has no string field 'text'; its fields are 'content'"),
        (b'{"text": 3}', r"a\.jsonl:2 has no string field 'text'"),
        (b'{"text": "x", "domain": null}', r"a\.jsonl:2 has domain=None"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl:2 is not UTF-8"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2 holds half a surrogate pair"),
    ],
)
def test_jsonl_mistake_is_located_by_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(encoded(LINES[:1]) + line + b"\n")
    with pytest.raises(UserError, match=message):
        read("jsonl", tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["plain", "truncated"])
def test_damaged_compressed_file_is_named(tmp_path, name, damage):
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    data = encoded() if damage == "plain" else compress(encoded())[:-9]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}.*damaged|{name}:\d+ is not JSON"):
        read("jsonl", tmp_path)


def test_text_folder_takes_domains_from_its_first_subfolders(tmp_path):
    for name in ("z.txt", "law/a.txt", "law/deep/b.md", "poems/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "law" / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "law" / "empty.txt").write_text("\n")
    assert [(d.text, d.domain) for d in read("text", tmp_path)] == [
        ("text of law/a.txt", "law"),
        ("text of law/deep/b.md", "law"),
        ("text of poems/c.txt", "poems"),
        ("text of z.txt", "text"),
    ]


def test_text_file_in_another_encoding_is_named_with_a_remedy(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8.*iconv"):
        read("text", tmp_path)


@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_missing_path_and_empty_folder_say_what_was_expected(tmp_path, source):
    with pytest.raises(UserError, match=r"data\.path=.*nowhere.*does not exist"):
        read(source, tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no files; expected names ending in"):
        read(source, tmp_path)
    with pytest.raises(UserError, match="holds no files"):
        read(source, tmp_path / "*.none")
