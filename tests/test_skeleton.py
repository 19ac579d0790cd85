"""The parts around the code: finding a Python, the Makefile's targets, what the package says it needs."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FINDER = ROOT / ".ci" / "find_python.sh"
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def good_python(path: Path) -> Path:
    """Answers the finder's question as a Python at `path` would."""
    return executable(path, f"echo '{path}'")


def find_python(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs the finder where only the programs in tmp_path/bin, and no home folder but tmp_path, exist."""
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **environment}
    return subprocess.run(["/bin/sh", FINDER], env=environment, capture_output=True, text=True)


def test_the_running_python_is_accepted_and_reported_by_its_real_path(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    found = find_python(tmp_path)
    assert found.returncode == 0, found.stderr
    version = subprocess.check_output([found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])"])
    assert eval(version) == sys.version_info[:2]


def test_a_shim_that_does_not_run_is_passed_over_for_a_later_good_one(tmp_path):
    executable(tmp_path / "bin" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    executable(tmp_path / "bin" / "python3.13", "echo 'is Python 3.11' >&2; exit 1")
    good = good_python(tmp_path / "bin" / "python3.14")
    assert find_python(tmp_path).stdout.strip() == str(good)


def test_a_python_named_by_the_user_comes_first(tmp_path):
    good_python(tmp_path / "bin" / "python3.12")
    mine = good_python(tmp_path / "elsewhere" / "my-python")
    assert find_python(tmp_path, PYTHON=str(mine)).stdout.strip() == str(mine)


def test_an_unusable_python_named_by_the_user_is_reported_and_replaced(tmp_path):
    good = good_python(tmp_path / "bin" / "python3.12")
    found = find_python(tmp_path, PYTHON="/no/such/python")
    assert found.stdout.strip() == str(good)
    assert "PYTHON=/no/such/python cannot be used (no such program)" in found.stderr


@pytest.mark.parametrize("setting", ["HOME", "PYENV_ROOT"])
def test_a_pyenv_version_is_found_without_being_on_the_path(tmp_path, setting):
    root = tmp_path / ("home/.pyenv" if setting == "HOME" else "custom")
    executable(root / "versions" / "3.11.7" / "bin" / "python", "echo 'wrong one'")
    good = good_python(root / "versions" / "3.13.0" / "bin" / "python")
    value = tmp_path / "home" if setting == "HOME" else root
    assert find_python(tmp_path, **{setting: str(value)}).stdout.strip() == str(good)


def test_a_python_managed_by_uv_is_found(tmp_path):
    good = good_python(tmp_path / "uv" / "python3.12")
    executable(tmp_path / "bin" / "uv", f"[ \"$1 $2\" = 'python find' ] && echo '{good}'")
    assert find_python(tmp_path).stdout.strip() == str(good)


def test_when_all_are_too_old_it_fails_and_says_what_to_install_where(tmp_path):
    executable(tmp_path / "bin" / "python3", "echo 'is Python 3.11' >&2; exit 1")
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert "python3 (is Python 3.11)" in found.stderr
    for system in ("Ubuntu", "Debian", "macOS", "pyenv", "uv", "conda"):
        assert re.search(rf"^  {system}.*: +(sudo apt|brew|pyenv|uv|conda) ", found.stderr, re.M), system


def test_a_python_without_venv_is_refused_with_the_package_that_adds_it(tmp_path):
    # A real interpreter that, like Debian's without python3-venv, has no ensurepip.
    wrapper = f'exec {sys.executable} -c "import sys; sys.modules[\'ensurepip\'] = None; exec(sys.argv[1])" "$2"'
    executable(tmp_path / "bin" / "python3", wrapper)
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in found.stderr


def make(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.check_output(["make", *arguments], cwd=ROOT, env=environment, text=True)


@needs_make
def test_make_alone_lists_every_target():
    listed = re.findall(r"^make (\w+)", make(), re.M)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(listed) == set(phony) - {"help"}


@needs_make
def test_make_demo_trains_both_arms_on_the_same_tokens_and_compares_them():
    for argument, folder in (("", "runs"), ("WORKDIR=/else where", "/else where")):
        made = make("-n", "demo", *filter(None, [argument, "ARGS=--config.train.steps=5"]))
        made = " ".join(made.replace("\\\n", " ").split())
        for name in ("emo_tiny", "stdmoe_tiny"):
            wanted = f"-m emo_jax.train --config=configs/{name}.py --workdir='{folder}/{name}' "
            assert wanted + f"--config.data.cache_dir='{folder}/tokens' --config.train.steps=5" in made
        assert f"-m emo_jax.evaluate --model='{folder}/emo_tiny,{folder}/stdmoe_tiny' --keep=32,16,8,4" in made


@pytest.fixture
def package(monkeypatch) -> dict:
    """What setup.py passes to setuptools, which need not be installed."""
    captured = {}
    fake = types.ModuleType("setuptools")
    fake.setup = captured.update
    fake.find_packages = lambda **_: []
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return captured


def requirements(package: dict, *extras: str) -> list[Requirement]:
    lines = package["install_requires"] + [line for extra in extras for line in package["extras_require"][extra]]
    return [Requirement(line) for line in lines]


def test_the_extras_that_the_documentation_names_exist(package):
    assert {"tpu", "cuda13", "evaluation", "notebooks", "dev"} <= set(package["extras_require"])


def test_libtpu_comes_only_from_the_jax_that_pins_it(package):
    every = requirements(package, *package["extras_require"])
    assert not [r for r in every if r.name.startswith(("libtpu", "jaxlib"))]
    assert len({str(r.specifier) for r in every if r.name == "jax"}) == 1


def test_the_installed_versions_are_within_the_ranges(package):
    wrong = []
    for requirement in requirements(package, "dev"):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        version = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} but {version} is installed")
    assert not wrong


def test_everything_that_emo_jax_imports_is_declared(package):
    users = [extra for extra in package["extras_require"] if extra != "dev"]
    declared = {normal(r.name) for r in requirements(package, *users)}
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in (ROOT / "emo_jax").rglob("*.py"):
        for name in imported(path) - set(sys.stdlib_module_names) - {"emo_jax"}:
            if not declared & {normal(provider) for provider in [name, *providers.get(name, [])]}:
                undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names
