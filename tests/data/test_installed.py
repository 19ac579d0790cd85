import collections
import sysconfig

import pytest

from emo_jax.data.installed import installed_documents
from emo_jax.errors import UserError


@pytest.fixture(scope="module")
def bare_roots():
    """What every installation of Python has, without packages or a system's documentation."""
    paths = sysconfig.get_paths()
    return [paths["stdlib"], paths["include"]]


def test_python_alone_yields_at_least_four_kinds(bare_roots):
    documents = list(installed_documents(bare_roots, bytes_per_kind=400_000))
    counts = collections.Counter(document.domain for document in documents)
    assert len(counts) >= 4
    assert min(counts.values()) >= 20


def test_no_kind_swamps_the_rest_and_order_is_the_same_every_time(bare_roots):
    first = list(installed_documents(bare_roots, bytes_per_kind=200_000))
    sizes = collections.defaultdict(list)
    for document in first:
        sizes[document.domain].append(len(document.text.encode()))
    assert max(sum(found[:-1]) for found in sizes.values()) < 200_000
    assert first == list(installed_documents(bare_roots, bytes_per_kind=200_000))
    assert len({document.text for document in first}) == len(first)


def test_minified_binary_numeric_tiny_and_own_files_are_left_out(tmp_path):
    prose = "A line of text that is long enough to be worth reading, number"
    (tmp_path / "emo_jax").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "good.md").write_text(f"{prose} one.\n" * 5)
    (tmp_path / "copy.md").write_text(f"{prose} one.\n" * 5 + "\n")
    (tmp_path / "minified.js").write_text("var a=b;" * 500)
    (tmp_path / "table.txt").write_text("123456 7890\n" * 50)
    (tmp_path / "tiny.md").write_text("tiny")
    (tmp_path / "latin.md").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "emo_jax" / "own.md").write_text(f"{prose} two.\n" * 5)
    (tmp_path / "tests" / "data.md").write_text(f"{prose} three.\n" * 5)
    documents = [d for d in installed_documents([str(tmp_path)], min_documents=1) if prose in d.text]
    assert [document.domain for document in documents] == ["reference"]
    assert "one" in documents[0].text


def test_code_and_docstrings_never_come_from_one_file(tmp_path):
    for number in range(60):
        module = f'"""Module {number} explains itself. {"At length. " * 30}"""\n'
        function = f'def f():\n    """Returns marker {number}."""\n    return 1\n'
        (tmp_path / f"m{number}.py").write_text(module + function)
    sides = collections.defaultdict(set)
    for document in installed_documents([str(tmp_path)], min_documents=1):
        if "Returns marker" in document.text:
            sides[document.domain].add(document.text.split("Module ")[1].split()[0])
    assert set(sides) == {"python", "docstrings"}
    assert not sides["python"] & sides["docstrings"]
    assert len(sides["python"] | sides["docstrings"]) == 60


def test_machine_without_text_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"data\.source"):
        list(installed_documents([str(tmp_path)], min_documents=1000))
