"""A copy of launch/ without anything around it."""

import shutil

import pytest

from tests.launch.scripts import LAUNCH, bare


@pytest.fixture
def clone(tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "a clone" / "launch")
    return tmp_path / "a clone"


@pytest.fixture
def environment(tmp_path):
    return bare(tmp_path / "home")
