"""Readers: each yields documents in an order that depends on nothing but the files."""

import contextlib
import glob
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any

import zstandard

from emo_jax.data.config import DataConfig, Part
from emo_jax.data.documents import Document
from emo_jax.data.installed import installed_documents
from emo_jax.errors import UserError, require, require_choice

DEFAULT_DOMAIN = "text"
COMPRESSED = (".gz", ".zst", ".zstd")
JSONL = tuple(kind + compression for kind in (".jsonl", ".json") for compression in ("", *COMPRESSED))
TEXT = (".txt", ".md")
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError)  # what a file that is cut off or not one raises
_CHUNK = 1 << 20


def read_documents(config: DataConfig) -> Iterator[tuple[Document, int]]:
    """The documents of `config.source`, whole, duplicates included, each with the index of its part of the mixture.

    Raises:
      UserError: if a path is missing, holds no documents, or a file cannot be read; while iterating.
    """
    for index, part in enumerate(config.parts()):
        for document in _read(part, config):
            named = part.name if part.name and document.domain == DEFAULT_DOMAIN else document.domain
            yield document._replace(domain=named), index


def _read(part: Part, config: DataConfig) -> Iterator[Document]:
    if part.source == "installed_text":
        return installed_documents()
    if part.source == "text":
        return text_documents(part.path)
    if part.source == "examples":
        return example_documents(part.path, config.labels)
    reader = {"jsonl": jsonl_documents, "tfds": tfds_documents}[part.source]
    return reader(part.path, config.text_field)


def jsonl_documents(path: str, text_field: str = "text") -> Iterator[Document]:
    """Yields one document a line of JSON objects with a text and an optional `domain`; blank ones are skipped.

    Args:
      path: a file, a folder (searched recursively for .jsonl and .json files) or a glob, each file plain,
        `.gz` or `.zst`.
      text_field: the field that holds the text.

    Raises:
      UserError: naming file and line of what is not JSON, not UTF-8, or lacks a text.
    """
    for value, where in _objects(path, text_field):
        document = to_document(value, where, text_field)
        if document.text.strip():
            yield document


def example_documents(path: str, labels: Sequence[str] = ()) -> Iterator[Document]:
    """Yields each line's `prompt` with its `answer` behind it, or its `text`; `domain` is optional.

    Args:
      path: as in `jsonl_documents`.
      labels: of a classifier: then each line has a `text`, maybe a `text_pair` (an empty one is none), and a `label`.

    Raises:
      UserError: as there; where an answer is empty, or a label is missing or unknown.
    """
    if labels:
        indices = {name: index for index, name in enumerate(labels)}
        for document, name, where in _labelled(path):
            require_choice(f"{where} has a label that is not in data.labels: label", name, labels)
            yield document._replace(label=indices[name])
        return
    for value, where in _objects(path, "text"):
        if "prompt" not in value:
            document = to_document(value, where, "text")
        else:
            prompt = to_document(value, where, "prompt")
            answer = to_document(value, where, "answer")
            require(bool(answer.text), f"{where} has an empty answer, from which nothing can be learnt.")
            document = Document(prompt.text + answer.text, prompt.domain, len(prompt.text.encode()))
        if document.text.strip():
            yield document


def label_names(path: str) -> tuple[str, ...]:
    """The labels that the examples of a file have, numbers in their order, others sorted: for `DataConfig.labels`.

    Args:
      path: as in `jsonl_documents`.

    Raises:
      UserError: as there; where a label is missing, or all are the same.
    """
    names = {name for _, name, _ in _labelled(path)}
    known = f"only the label {', '.join(map(repr, names))}" if names else "no examples"
    require(len(names) > 1, f"{path} has {known}; a classifier needs examples of at least two.")
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def has_labels(path: str) -> bool:
    """Whether the first example of a file is a text with a label."""
    first, _ = next(_objects(path, "text"), ({}, ""))
    return "label" in first and "prompt" not in first


def _labelled(path: str) -> Iterator[tuple[Document, str, str]]:
    """Yields each text that is not blank, its pair behind it, the name of its label and where it stands."""
    for value, where in _objects(path, "text"):
        first = to_document(value, where, "text")
        paired = value.get("text_pair") is not None
        text = first.text + (to_document(value, where, "text_pair").text if paired else "")
        if text.strip():
            yield Document(text, first.domain, len(first.text.encode())), _label(value, where), where


def _label(value: dict[str, Any], where: str) -> str:
    label = value.get("label")
    require(label is not None, f"{where} has no label; its fields are {', '.join(map(repr, value))}.")
    require(
        isinstance(label, str | int) and label != "",
        f"{where} has label={label!r}; a label is a string, a whole number, true or false.",
    )
    name = str(label).lower() if isinstance(label, bool) else str(label)
    _check_characters(name, where)
    return name


def _objects(path: str, field: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields each line's object and where it stands; `field` is named in the error about a line that is none."""
    for file, _ in _find(path, JSONL):
        for number, line in _lines(file):
            yield parse_object(line, f"{file}:{number}", field), f"{file}:{number}"


def tfds_documents(path: str, text_field: str = "text") -> Iterator[Document]:
    """Yields the examples of a dataset's `train` split that are not blank; a `domain` feature is optional.

    Args:
      path: the folder of a prepared dataset, the one with `dataset_info.json`, or a name, which is looked up
        in `TFDS_DATA_DIR` and else downloaded.
      text_field: the feature that holds the text.

    Raises:
      UserError: if there is no such dataset, its format is not ArrayRecord, or an example lacks a text.
    """
    examples = tfds_examples(path)
    for number in range(len(examples)):
        document = tfds_document(examples[number], f"{path}: train example {number}", text_field)
        if document.text.strip():
            yield document


def tfds_examples(path: str) -> Sequence[dict[str, Any]]:
    """The examples of a dataset's `train` split, read as they are asked for.

    Args:
      path: as in `tfds_documents`.

    Raises:
      UserError: if there is no such dataset, or its format is not ArrayRecord.
    """
    import tensorflow_datasets as tfds  # takes more than a second

    folder = pathlib.Path(path).expanduser()
    try:
        if folder.is_dir() or "://" in path:
            return tfds.builder_from_directory(path if "://" in path else folder).as_data_source(split="train")
        return tfds.data_source(path, split="train")
    except Exception as error:  # of many kinds; the first line says what, the others list every dataset there is
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data.path={path!r} gives no TensorFlow Datasets training split ({type(error).__name__}: {reason}); give "
            "the folder with its dataset_info.json, prepared with file_format='array_record', or a name."
        ) from error


def tfds_document(example: dict[str, Any], where: str, text_field: str) -> Document:
    """The text and the domain of an example.

    Raises:
      UserError: beginning with `where`, as `to_document` does, or where a feature is not UTF-8.
    """
    try:
        value = {k: v.decode() if isinstance(v, bytes) else v for k, v in example.items()}
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    return to_document(value, where, text_field)


def text_documents(path: str) -> Iterator[Document]:
    """Yields every .txt and .md file as a document; its domain is the first subfolder below `path`, else "text".

    Args:
      path: a folder (searched recursively), a file or a glob.

    Raises:
      UserError: if there is no such file, or one is not UTF-8.
    """
    for file, domain in _find(path, TEXT):
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except FileNotFoundError as error:
            raise UserError(f"{file} was there and has gone while it was read; put it back and run again.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): {_REENCODE}") from error
        if text.strip():
            yield Document(text, domain)


_REENCODE = "convert it, for example with `iconv -f LATIN1 -t UTF-8`, or take it out of data.path."


def _find(path: str, suffixes: tuple[str, ...]) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields each file with its domain by folder, sorted by path."""
    root = pathlib.Path(path).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file() and file.name.endswith(suffixes))
    elif glob.has_magic(path):
        files = [pathlib.Path(name) for name in sorted(glob.glob(str(root), recursive=True))]
        files = [file for file in files if file.is_file()]
    else:
        raise UserError(f"data.path={path!r} does not exist; give a file, a folder or a glob in quotes.")
    require(bool(files), f"data.path={path!r} holds no files; expected names ending in {', '.join(suffixes)}.")
    for file in files:
        below = file.relative_to(root).parts if root.is_dir() else ()
        yield file, below[0] if len(below) > 1 else DEFAULT_DOMAIN


def _lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yields numbered lines that are not blank, decompressed by the file's suffix."""
    try:
        with file.open("rb") as opened, contextlib.closing(decompressed_lines(opened, file.suffix)) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError as error:
        raise UserError(f"{file} was there and has gone while it was read; put it back and run again.") from error
    except DAMAGE as error:
        raise UserError(f"{file} is damaged or not what its suffix says ({error}); fetch it again.") from error


def decompressed_lines(file: IO[bytes], suffix: str) -> Generator[bytes]:
    """Yields the lines of an open file, decompressed as its suffix says.

    Raises:
      Exception: one of `DAMAGE`, where the file is cut off or not compressed so.
    """
    if suffix in (".zst", ".zstd"):
        yield from _zstandard_lines(file)
    elif suffix == ".gz":
        with gzip.open(file) as lines:
            yield from lines
    else:
        yield from file


def _zstandard_lines(compressed: IO[bytes]) -> Generator[bytes]:
    """Yields lines; unlike the library's own reader it notices a file that was cut off."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    stream, line = decompressor.decompressobj(), b""
    while data := compressed.read(_CHUNK):
        while data:
            if stream.eof:
                stream = decompressor.decompressobj()
            *lines, line = (line + stream.decompress(data)).split(b"\n")
            yield from lines
            data = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise EOFError("it ends in the middle of a frame")
    yield line


def parse_object(line: bytes, where: str, text_field: str) -> dict[str, Any]:
    """A line's object.

    Args:
      line: as it stands in the file.
      where: file and line, which an error begins with.
      text_field: named in the error about a line that is no object.

    Raises:
      UserError: where it is not UTF-8, or not a JSON object.
    """
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert the file.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); every line must be one whole object.") from error
    require(isinstance(value, dict), f"{where} is not a JSON object; every line needs one with a {text_field!r} field.")
    return value


def to_document(value: Any, where: str, text_field: str) -> Document:
    """The text and the domain of an object.

    Args:
      value: a JSON object or an example.
      where: an error begins with it.
      text_field: the field that holds the text.

    Raises:
      UserError: where there is no text, no name of a domain, or what no encoding can hold.
    """
    text, domain = value.get(text_field), value.get("domain", DEFAULT_DOMAIN)
    found = ", ".join(map(repr, value)) or "none"
    require(isinstance(text, str), f"{where} has no string field {text_field!r}; its fields are {found}.")
    require(isinstance(domain, str) and bool(domain), f"{where} has domain={domain!r}; give a name or leave it out.")
    _check_characters(text + domain, where)
    return Document(text, domain)


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a surrogate pair, which is no character; repair that line.") from error
