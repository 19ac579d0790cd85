"""Units of work: parts of the input of about one size, which read alike whoever reads them.

A unit is a file, a range of an uncompressed file's lines, some text files, or a range of a dataset's examples. What a
unit yields is a function of its bytes alone, so units can be done in any order, by any number of processes.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from emo_jax.data.documents import Document
from emo_jax.data.files import find_files, join, open_file
from emo_jax.data.sources import (
    COMPRESSED,
    DAMAGE,
    DEFAULT_DOMAIN,
    JSONL,
    TEXT,
    decompressed_lines,
    parse_object,
    tfds_document,
    tfds_examples,
    to_document,
)
from emo_jax.errors import UserError

_MEGABYTE = 10**6
_READ = 1 << 22
_TEXT_FILES = 10_000  # in a unit at most: their names travel with it


class Corrupt(NamedTuple):
    """What could not be read: a line of a file (or an example), or all of a file where `line` is 0."""

    file: str
    line: int
    reason: str


class BrokenFile(Exception):
    """A file that cannot be read to its end; whatever it gave before is not to be used."""

    def __init__(self, file: str, reason: str):
        super().__init__(f"{file}: {reason}")
        self.corrupt = Corrupt(file, 0, reason)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of the input.

    Attributes:
      files: names relative to the input's folder.
      sizes: of the files, in bytes; of a dataset its number of examples.
      start, stop: bytes of the only file whose lines are read, or examples; of other files 0 and −1.
      domain: of an array of tokens.
    """

    files: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int = 0
    stop: int = -1
    domain: str = ""

    @property
    def bytes(self) -> int:
        """How much input this is, roughly, for a dataset in examples."""
        return self.stop - self.start if self.stop >= 0 else sum(self.sizes)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        value = dataclasses.asdict(self) | {"files": list(self.files), "sizes": list(self.sizes)}
        return {name: own for name, own in value.items() if own != ""}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Unit":
        """The inverse of `to_json`."""
        return cls(tuple(value["files"]), tuple(value["sizes"]), value["start"], value["stop"], value.get("domain", ""))


class Input(NamedTuple):
    """What a preparation reads.

    Attributes:
      source: `jsonl`, `text` or `tfds`.
      root: the folder that names of files are relative to; of a dataset its folder or name.
      by_folder: whether the first folder below `root` is a text file's domain.
      text_field: where the text stands.
    """

    source: str
    root: str
    by_folder: bool
    text_field: str


def plan_units(source: str, path: str, text_field: str, megabytes: float) -> tuple[Input, list[Unit]]:
    """Divides the input into units.

    Args:
      source: `jsonl`, `text` or `tfds`.
      path: a file, folder or glob; a dataset's folder or name.
      text_field: where the text stands.
      megabytes: about how many 10⁶ bytes a unit holds; a compressed file is one unit, however large.

    Raises:
      UserError: if there is nothing to read.
    """
    size = max(1, int(megabytes * _MEGABYTE))
    if source == "tfds":
        return Input(source, path, False, text_field), _example_units(path, size)
    root, is_folder, files = find_files(path, JSONL if source == "jsonl" else TEXT)
    made = _text_units(files, size) if source == "text" else _line_units(files, size)
    return Input(source, root, is_folder, text_field), made


def read_unit(given: Input, unit: Unit) -> Iterator[Document | Corrupt]:
    """The documents of a unit, blank ones too, and what in it cannot be read, in their order.

    Line numbers count from the unit's first line.

    Raises:
      BrokenFile: where a compressed file is cut off or damaged; while iterating.
      UserError: where a file has gone.
    """
    if given.source == "tfds":
        return _examples(given, unit)
    return _texts(given, unit) if given.source == "text" else _lines(given, unit)


def lines_before(given: Input, unit: Unit) -> int:
    """How many lines of its file begin before a unit's range."""
    with open_file(join(given.root, unit.files[0])) as file:
        return _count_lines(file, unit.start)


def range_lines(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The lines of an uncompressed file that begin in bytes [start, stop), whole."""
    position = start
    if start:
        file.seek(start - 1)
        position += len(file.readline()) - 1  # the line that byte start − 1 is of, its newline perhaps
    while position < stop:
        line = file.readline()
        if not line:
            return
        position += len(line)
        yield line


def _line_units(files: list[tuple[str, int]], size: int) -> list[Unit]:
    units = []
    for name, total in files:
        if name.endswith(COMPRESSED):
            units.append(Unit((name,), (total,)))
            continue
        count = max(1, round(total / size))
        bounds = [total * place // count for place in range(count + 1)]
        units += [Unit((name,), (total,), start, stop) for start, stop in itertools.pairwise(bounds)]
    return units


def _text_units(files: list[tuple[str, int]], size: int) -> list[Unit]:
    units: list[Unit] = []
    names: list[str] = []
    sizes: list[int] = []
    held = 0
    for name, total in files:
        names.append(name)
        sizes.append(total)
        held += total
        if held >= size or len(names) == _TEXT_FILES:
            units.append(Unit(tuple(names), tuple(sizes)))
            names, sizes, held = [], [], 0
    return [*units, Unit(tuple(names), tuple(sizes))] if names else units


def _example_units(path: str, size: int) -> list[Unit]:
    examples = tfds_examples(path)
    total = len(examples)
    shown = [len(repr(examples[place])) for place in range(0, total, max(1, total // 32))]
    each = max(1, int(size * len(shown) / max(sum(shown), 1)))  # examples of about `size` bytes in all
    bounds = [*range(0, total, each), total]
    return [Unit(("train",), (total,), start, stop) for start, stop in itertools.pairwise(bounds)]


def _lines(given: Input, unit: Unit) -> Iterator[Document | Corrupt]:
    (name,) = unit.files
    with _opened(given, name) as file:
        lines: Iterator[bytes]
        if unit.stop >= 0:
            lines = range_lines(file, unit.start, unit.stop)
        else:
            lines = decompressed_lines(file, pathlib.PurePosixPath(name).suffix)
        numbered = enumerate(lines, start=1)
        while True:
            try:
                number, line = next(numbered)
            except StopIteration:
                return
            except DAMAGE as error:
                raise BrokenFile(name, f"is damaged or not what its suffix says ({error})") from error
            if not line.strip():
                continue
            try:
                yield to_document(parse_object(line, "", given.text_field), "", given.text_field)
            except UserError as error:
                yield Corrupt(name, number, str(error).strip())


def _texts(given: Input, unit: Unit) -> Iterator[Document | Corrupt]:
    for name in unit.files:
        parts = name.split("/")
        with _opened(given, name) as file:
            data = file.read()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield Corrupt(name, 0, f"is not UTF-8 ({error.reason} at byte {error.start})")
            continue
        yield Document(text, parts[0] if given.by_folder and len(parts) > 1 else DEFAULT_DOMAIN)


def _examples(given: Input, unit: Unit) -> Iterator[Document | Corrupt]:
    examples = tfds_examples(given.root)
    for number in range(unit.start, unit.stop):
        try:
            yield tfds_document(examples[number], "", given.text_field)
        except UserError as error:
            yield Corrupt("train", number - unit.start + 1, str(error).strip())


@contextlib.contextmanager
def _opened(given: Input, name: str) -> Iterator[IO[bytes]]:
    path = join(given.root, name)
    try:
        file = open_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} was there and has gone while it was read; put it back and run again.") from error
    with file:
        yield file


def _count_lines(file: IO[bytes], stop: int) -> int:
    """Newlines before byte `stop`: a line that begins earlier has its newline there, or is the one `stop` is in."""
    count, left = 0, stop
    last = b"\n"
    while left and (data := file.read(min(_READ, left))):
        count += data.count(b"\n")
        left -= len(data)
        last = data[-1:]
    return count + (last != b"\n")
