"""Races that Pallas' TPU interpreter finds in a kernel are failures: it prints them, and goes on."""

import pytest


@pytest.fixture(autouse=True)
def no_races(capfd):
    yield
    captured = capfd.readouterr()
    assert "RACE DETECTED" not in captured.out + captured.err
