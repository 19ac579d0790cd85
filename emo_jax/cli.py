"""What the mains share: a `--config` flag over the run's dataclass, and errors a person can read.

Nothing heavy is imported here, so that a mistake in the flags and the restart of `run` cost little.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

from emo_jax.errors import UserError

if TYPE_CHECKING:
    from emo_jax.config import Config

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Lets the allocator ask for huge pages: on CPU a step spends almost half its time faulting in small ones."""


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE`, whose `get_config()` returns a `Config`, and `--config.section.field=value`."""
    return config_flags.DEFINE_config_file("config", help_string="File with get_config(), such as configs/emo_tiny.py.")


def define_recipe(recipe: Config) -> flags.FlagHolder:
    """Defines `--config.section.field=value` over a config that is there already; a mistake ends the program."""
    _check_flags()
    return config_flags.DEFINE_config_dataclass("config", recipe)


def run(main: Callable[..., int | None], commands: Sequence[str] = ()) -> None:
    """Parses flags, runs `main` and exits with its status; a `UserError` is printed without a traceback, status 2.

    With `commands`, one of them stands before the flags, and `main` is called with it.

    On Linux the process first replaces itself by one with `HUGE_PAGES` in its environment, where the C library
    reads it; set the variable yourself, even to nothing, to prevent that.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in HUGE_PAGES):
        os.execve(sys.executable, sys.orig_argv, os.environ | HUGE_PAGES)

    if commands and not any(name in sys.argv[1:] for name in (*commands, "--help", "--helpfull", "--helpshort")):
        words = " or ".join(commands)
        other = next((f", not {word!r}" for word in sys.argv[1:] if not word.startswith("-")), "")
        print(f"Error: say what to do first, {words}{other}: python -m {_module()} {commands[0]} --…", file=sys.stderr)
        sys.exit(2)

    def guarded(argv: list[str]) -> int | None:
        given, rest = argv[1 : 1 + bool(commands)], argv[1 + bool(commands) :]
        if rest or not set(given) <= set(commands):
            raise app.UsageError(f"unexpected argument {(rest or given)[0]!r}: every option starts with --")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell every file they write
        try:
            return main(*given)
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return 130

    _check_flags()
    flags.FLAGS.set_gnu_getopt()  # flags may stand before a command too
    app.run(guarded)


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


class Bar:
    """Bytes done, speed and remaining time: a line that renews itself, or one in a while where no one watches."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._start = self._shown = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """Shows how far it is."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first  # of an interrupted conversion
        watched = sys.stderr.isatty()
        if not watched and now - self._shown < 30:
            return
        self._shown = now
        speed = (done - self._first) / max(now - self._start, 1e-9)
        left = f", {(total - done) / speed:,.0f} s left" if speed else ""
        line = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s{left}"
        end = "\n" if done == total or not watched else ""
        print(f"\r{line:<60}" if watched else line, end=end, file=sys.stderr, flush=True)


def check_config(config: object) -> Config:
    """The flag's value, as a `Config`.

    Raises:
      UserError: where there is no file, or it returned something else.
    """
    from emo_jax.config import Config

    if config is None:
        raise UserError("--config is missing; give a file with get_config(), such as --config=configs/emo_tiny.py.")
    if not isinstance(config, Config):
        raise UserError(f"get_config() of --config returned a {type(config).__name__}, not an emo_jax.config.Config.")
    return config


def _check_flags() -> None:
    """Ends the program where an override cannot work: before absl, whose own answer is a KeyError."""
    try:
        _check_overrides(sys.argv[1:])
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _check_overrides(argv: list[str]) -> None:
    from emo_jax.config import field_names, unknown_field_message

    names = field_names()
    for argument in argv:
        name = argument.split("=")[0].lstrip("-")
        if argument.startswith("--config.") and name.removeprefix("config.") not in names:
            raise UserError(unknown_field_message(name.removeprefix("config.")))
        if argument.startswith("--config="):
            _check_file(argument.removeprefix("--config="))


def _check_file(path: str) -> None:
    file = Path(path)
    if file.is_file():
        return
    known = sorted(str(p) for p in (file.parent if file.parent.is_dir() else Path("configs")).glob("*.py"))
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"There is no config file {path!r}.{hint}")
