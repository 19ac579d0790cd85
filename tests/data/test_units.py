import gzip
import io
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_jax.data.sources import jsonl_documents, text_documents
from emo_jax.data.units import BrokenFile, Corrupt, lines_before, plan_units, range_lines, read_unit
from emo_jax.errors import UserError

LINES = st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30)


def documents(source, path, megabytes):
    given_input, units = plan_units(source, str(path), "text", megabytes)
    return units, [item for unit in units for item in read_unit(given_input, unit)]


@given(LINES, st.booleans(), st.lists(st.integers(0, 400), max_size=6))
def test_ranges_cover_every_line_once_whatever_their_bounds(lines, ended, cuts):
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    bounds = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    found = [line for start, stop in itertools.pairwise(bounds) for line in range_lines(io.BytesIO(data), start, stop)]
    assert found == list(io.BytesIO(data))


@pytest.mark.parametrize("megabytes", [1e-4, 0.003, 10.0])
def test_units_of_any_size_hold_the_documents_of_the_whole(tmp_path, corpus, megabytes):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = corpus.read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:100]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[100:180]).encode()))
    (folder / "c.jsonl").write_text("".join(lines[180:]).rstrip("\n"))
    units, found = documents("jsonl", folder, megabytes)
    assert found == list(jsonl_documents(str(folder)))
    assert sum(unit.bytes for unit in units) == sum(file.stat().st_size for file in folder.iterdir())
    assert (len(units) > 3) == (megabytes < 1)


def test_lines_before_a_range_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'{"text": "%d"}\n' % number for number in range(50)))
    given_input, units = plan_units("jsonl", str(path), "text", 1e-4)
    number = 0
    for unit in units:
        assert lines_before(given_input, unit) == number
        number += len(list(read_unit(given_input, unit)))
    assert number == 50
    assert len(units) > 5


def test_text_files_are_grouped_and_keep_their_domains(tmp_path):
    for name in ("z.txt", "law/a.txt", "law/deep/b.md", "poems/c.txt", "poems/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    units, found = documents("text", tmp_path, 3e-5)
    assert len(units) == 2
    assert sorted(found) == sorted(text_documents(str(tmp_path)))


def test_a_bad_line_is_one_item_and_a_cut_off_file_breaks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n\n{"text": "y"}\n{"txt": "z"}\n')
    _, found = documents("jsonl", tmp_path / "a.jsonl", 1.0)
    assert [item.line for item in found if isinstance(item, Corrupt)] == [2, 5]
    assert [item.text for item in found if not isinstance(item, Corrupt)] == ["x", "y"]
    whole = gzip.compress(json.dumps({"text": "word " * 5000}).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(BrokenFile) as broken:
        documents("jsonl", tmp_path / "b.jsonl.gz", 1.0)
    assert broken.value.corrupt.file == "b.jsonl.gz"
    assert broken.value.corrupt.line == 0


def test_a_file_that_has_gone_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    given_input, (unit,) = plan_units("jsonl", str(tmp_path), "text", 1.0)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl was there and has gone"):
        list(read_unit(given_input, unit))
    with pytest.raises(UserError, match=r"--path=.* holds no files; expected names ending in"):
        plan_units("jsonl", str(tmp_path), "text", 1.0)
    with pytest.raises(UserError, match=r"--path=.*nowhere.* does not exist"):
        plan_units("jsonl", str(tmp_path / "nowhere"), "text", 1.0)
