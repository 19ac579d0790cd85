import gzip
import json
import os
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
import zstandard

from emo_jax.data import DataConfig, build_store, label_names, read_documents
from emo_jax.errors import UserError

LINES = [{"text": "one"}, {"text": "two", "domain": "d"}, {"text": "žluť", "domain": "d"}]
EXPECTED = [("one", "text"), ("two", "d"), ("žluť", "d")]


def encoded(lines=LINES):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def read(source, path, text_field="text"):
    config = DataConfig(source=source, path=str(path), text_field=text_field)
    return [document[:2] for document, _ in read_documents(config)]


def write_dataset(data_dir, examples, split="train", name="tiny_tales"):
    """An ArrayRecord dataset as `tfds build` writes it; every example has the features of the first."""
    features = {key: tfds.features.Text() for key in examples[0]}
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="tests"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits([split])
    writer.add_examples({split: examples})
    writer.close_all()
    return folder


def test_tfds_reads_a_prepared_dataset_by_its_folder_without_tensorflow(tmp_path):
    folder = write_dataset(tmp_path, [{"domain": "d", **line} for line in LINES] + [{"text": " ", "domain": "d"}])
    expected = [("one", "d"), *EXPECTED[1:]]
    assert read("tfds", folder) == expected
    assert "tensorflow" not in sys.modules


def test_tfds_name_is_looked_up_in_the_data_folder(tmp_path):
    write_dataset(tmp_path, [{"body": "one"}, {"body": "žluť"}])
    code = (
        "import sys; from emo_jax.data import DataConfig, read_documents; "
        "assert 'tensorflow_datasets' not in sys.modules; "
        "print(ascii([tuple(d[:2]) for d, _ in read_documents("
        "DataConfig(source='tfds', path='tiny_tales', text_field='body'))]))"
    )
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert output.stdout.splitlines()[-1] == ascii([("one", "text"), ("žluť", "text")])


def test_tfds_dataset_becomes_a_store(tmp_path):
    texts = [f"document number {number}" for number in range(50)]
    config = DataConfig(source="tfds", path=str(write_dataset(tmp_path, [{"text": text} for text in texts])))
    store = build_store(config, 300, tmp_path / "store")
    assert sum(store.manifest[name]["documents"] for name in ("train", "heldout")) == 50


def test_tfds_mistakes_are_answered_with_what_to_give(tmp_path):
    expected = r"gives no TensorFlow Datasets training split.*file_format='array_record'"
    for path in (tmp_path, tmp_path / "nowhere", "no_such_dataset_anywhere"):
        with pytest.raises(UserError, match=expected) as raised:
            read("tfds", path)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"Unknown split 'train'"):
        read("tfds", write_dataset(tmp_path, [{"text": "one"}], "test"))
    folder = write_dataset(tmp_path, [{"body": "one"}], name="other")
    with pytest.raises(UserError, match=r"train example 0 has no string field 'text'; its fields are 'body'"):
        read("tfds", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=expected):
        read("tfds", folder)


def test_jsonl_text_may_have_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "one", "text": 3}')
    assert read("jsonl", tmp_path, "body") == EXPECTED[:1]


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


def read_labelled(path, *labels):
    config = DataConfig(source="examples", path=str(path), labels=labels, packing="best_fit")
    config.validate()
    return [tuple(document) for document, _ in read_documents(config)]


def test_texts_and_pairs_are_read_with_the_indices_of_their_labels(tmp_path):
    lines = [
        {"text": "žluť", "text_pair": " is yellow", "label": "yes", "domain": "d"},
        {"text": "one", "label": True},
        {"text": "two", "text_pair": None, "label": 0},
        {"text": "two", "text_pair": "", "label": "0"},
        {"text": "", "text_pair": "alone", "label": "yes"},
        {"text": " "},
    ]
    (tmp_path / "a.jsonl").write_bytes(encoded(lines))
    assert read_labelled(tmp_path, "0", "true", "yes") == [
        ("žluť is yellow", "d", len("žluť".encode()), 2),
        ("one", "text", 3, 1),
        ("two", "text", 3, 0),
        ("two", "text", 3, 0),
        ("alone", "text", 0, 2),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, r"a\.jsonl:2 has no label; its fields are 'text'"),
        ({"text": "x", "label": None}, r"a\.jsonl:2 has no label; its fields are 'text', 'label'"),
        ({"text": "x", "label": 1.5}, r"a\.jsonl:2 has label=1\.5; a label is a string, a whole number, true or false"),
        ({"text": "x", "label": ""}, r"a\.jsonl:2 has label=''"),
        ({"text": "x", "label": "\ud800"}, r"a\.jsonl:2 holds half a surrogate pair"),
        ({"prompt": "x", "answer": "y", "label": "yes"}, r"a\.jsonl:2 has no string field 'text'"),
        ({"text": "x", "text_pair": 3, "label": "yes"}, r"a\.jsonl:2 has no string field 'text_pair'"),
        (
            {"text": "x", "label": "yess"},
            r"a\.jsonl:2 has a label that is not in data\.labels: label='yess' is not one of 'no', 'yes'\. "
            r"Did you mean 'yes'\?",
        ),
    ],
)
def test_mistake_about_a_label_is_located_by_file_and_line(tmp_path, line, message):
    lines = [{"text": "one", "label": "no"}, line]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_labelled(tmp_path / "a.jsonl", "no", "yes")


def test_labels_of_a_file_come_in_the_order_of_numbers_or_of_names(tmp_path):
    path = tmp_path / "a.jsonl"
    for given, expected in (
        ([10, 9, "-1", 10], ("-1", "9", "10")),
        (["b", "a", 10, 9], ("10", "9", "a", "b")),
        ([True, False], ("false", "true")),
    ):
        path.write_bytes(encoded([{"text": "x", "label": label} for label in given]))
        assert label_names(str(path)) == expected
    path.write_bytes(encoded([{"text": "x", "label": "same"}] * 2))
    with pytest.raises(UserError, match=r"a\.jsonl has only the label 'same'; a classifier needs .* at least two"):
        label_names(str(path))
    path.write_bytes(encoded([{"text": " "}]))
    with pytest.raises(UserError, match=r"has no examples"):
        label_names(str(path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("a",)}, r"data\.labels=\('a',\) must be at least two different names"),
        ({"labels": ("a", "a")}, r"data\.labels=\('a', 'a'\) must be at least two different names"),
        ({"source": "jsonl"}, r"data\.source='jsonl' has no labels.*only data\.source='examples'"),
        ({"source": "tokens"}, r"data\.source='tokens' has no labels"),
        ({"source": "mixture", "path": "", "mixture": ("a=1:examples:x",)}, r"data\.source='mixture' has no labels"),
        ({"packing": "concatenate"}, r"data\.packing='concatenate' cuts texts .* set data\.packing='best_fit'"),
        ({"label_at": "middle"}, r"data\.label_at='middle' is not one of 'first', 'last'"),
        ({"labels": (), "special_tokens": True}, r"data\.special_tokens=True is for texts with labels"),
    ],
)
def test_what_does_not_go_with_labels_is_refused(fields, message):
    given = {"source": "examples", "path": "x", "labels": ("a", "b"), "packing": "best_fit"}
    DataConfig(**given).validate()
    with pytest.raises(UserError, match=message):
        DataConfig(**(given | fields)).validate()


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
    assert read("text", tmp_path) == [
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


@pytest.mark.parametrize(("source", "suffix"), [("text", ".txt"), ("jsonl", ".jsonl")])
def test_a_file_that_vanishes_while_reading_is_named(tmp_path, source, suffix):
    for name in ("a", "b"):
        (tmp_path / f"{name}{suffix}").write_text('{"text": "words"}')
    documents = read_documents(DataConfig(source=source, path=str(tmp_path)))
    next(documents)
    (tmp_path / f"b{suffix}").unlink()
    with pytest.raises(UserError, match=rf"b{suffix} was there and has gone while it was read; put it back"):
        list(documents)


@pytest.mark.slow
def test_a_document_of_50_megabytes_beside_an_empty_one_trains_in_pieces(tmp_path):
    lines = [json.dumps({"text": "one more line of a long book\n" * 1_750_000}), json.dumps({"text": ""})]
    (tmp_path / "books.jsonl").write_text("\n".join([*lines, json.dumps({"text": "a short one"})]))
    assert (tmp_path / "books.jsonl").stat().st_size > 50e6
    config = DataConfig(source="jsonl", path=str(tmp_path), heldout_fraction=1e-9, max_document_bytes=10**6)
    store = build_store(config, 400, tmp_path / "store")
    assert len(store.train) == 51 + 1
    assert store.train.offsets[-1] == len(store.train.tokens)
    text = store.tokenizer().decode(store.train.tokens[: store.train.offsets[1]].tolist())
    assert set(text.splitlines()) <= {"one more line of a long book", "a short one"}
