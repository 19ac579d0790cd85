"""The documentation: it builds without a warning, leaves nothing public out, and names no flag that does not exist."""

import ast
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from emo_jax.config import field_names
from emo_jax.data.config import PrepareConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NEEDED = ("sphinx", "furo", "myst_nb", "sphinx_copybutton")
PROGRAMS = sorted(
    file.stem for file in (ROOT / "emo_jax").glob("*.py") if '__name__ == "__main__"' in file.read_text("utf-8")
)
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md"]
PAGES += [page for folder in (DOCS, DOCS / "tasks", DOCS / "concepts") for page in sorted(folder.glob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built as `make docs` builds them."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the documentation needs {', '.join(missing)}: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("docs") / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def objects(site) -> dict[str, set[str]]:
    """Names of all that the pages describe, by kind: the index that other projects' documentation links to."""
    found: dict[str, set[str]] = {}
    *_, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    for line in zlib.decompress(packed).decode().splitlines():
        name, kind = re.match(r"(.+?) (\S+:\S+) ", line).groups()
        found.setdefault(kind, set()).add(name)
    return found


def exports() -> list[str]:
    """Full names in the `__all__` of every package."""
    names = []
    for file in sorted((ROOT / "emo_jax").rglob("__init__.py")):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names += [f"{package}.{name}" for name in ast.literal_eval(node.value)]
    return names


def flags(program: str) -> set[str]:
    """The flags that a program defines, read from its source."""
    if program == "prepare":
        return {field.name for field in dataclasses.fields(PrepareConfig)} | {"workers"}
    source = (ROOT / "emo_jax" / f"{program}.py").read_text("utf-8")
    return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))


def test_every_public_name_is_in_the_api_reference(objects):
    described = set().union(*(names for kind, names in objects.items() if kind.startswith("py:")))
    assert len(exports()) > 50
    assert sorted(set(exports()) - described) == ["emo_jax.__version__"]


def test_every_program_is_in_the_commands_reference_with_all_its_flags(objects):
    assert {"train", "evaluate", "generate", "select", "plan"} <= set(PROGRAMS)
    for program in PROGRAMS:
        wanted = {f"emo_jax.{program}.--{flag}" for flag in flags(program)}
        assert wanted
        assert sorted(wanted - objects["std:cmdoption"]) == []


def test_every_config_field_is_described_with_its_type_and_default(objects, site):
    assert set(field_names()) == objects["std:config"]
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "config.html").read_text("utf-8"))
    assert "pool.min: int = 8" in text
    assert "Smallest pool; sizes are drawn uniformly from min..max" in text


def test_every_config_file_is_shown(site):
    text = (site / "reference" / "configs.html").read_text("utf-8")
    for file in (ROOT / "configs").glob("*.py"):
        assert file.name in text


def test_every_link_inside_the_pages_leads_somewhere(site, tmp_path):
    check_links = load(DOCS / "check_links.py")
    assert check_links.broken(site) == []
    (tmp_path / "a.html").write_text(
        '<a id="x" href="#x"></a><a href="#y"></a><a href="b.html"></a><a href="//c/d"></a>'
    )
    assert check_links.broken(tmp_path) == ["a.html: #y", "a.html: b.html"]


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        if page.parent.name != "notebooks":  # whose outputs are their own
            assert (
                re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?:', page.read_text("utf-8"))
                == []
            )


def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^ *```([\w{}-]*)[^\n]*\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Programs of the package in some lines of a shell, each with the names of its flags."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [match for line in lines for match in re.findall(r"-m emo_jax\.(\w+)(.*)", line)]
    return [(program, re.findall(r"(?<= )--(\w+)", rest)) for program, rest in found]


def test_commands_are_found_in_text():
    text = "python -m emo_jax.train --config=a.py \\\n    --workdir=b --config.data.path='c'\npython -m emo_jax.plan\n"
    assert commands(text) == [("train", ["config", "workdir", "config"]), ("plan", [])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_flags_and_fields_that_a_page_shows_exist(page):
    for field in re.findall(r"--config\.(\w+\.\w+)", page.read_text("utf-8")):
        assert field in field_names()
    for block in blocks(page, "", "sh"):
        for program, given in commands(block):
            assert program in PROGRAMS
            known = flags(program) | {"help", "config"}
            assert [name for name in given if name not in known and name.removeprefix("no") not in known] == []
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_pages_name_every_extra():
    text = (DOCS / "install.md").read_text("utf-8")
    source = (ROOT / "setup.py").read_text("utf-8")
    extras = re.findall(r'^        "(\w+)": (?:\[|DOCS)', source, re.MULTILINE)
    assert {"tpu", "docs", "dev"} <= set(extras)
    for extra in extras:
        assert f"| `{extra}` |" in text
