"""What the mains share: a `--config` flag over the run's dataclass, and errors a person can read.

Nothing heavy is imported here, so that a mistake in the flags and the restart of `run` cost little.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
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


def run(main: Callable[[], int | None]) -> None:
    """Parses flags, runs `main` and exits with its status; a `UserError` is printed without a traceback, status 2.

    On Linux the process first replaces itself by one with `HUGE_PAGES` in its environment, where the C library
    reads it; set the variable yourself, even to nothing, to prevent that.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in HUGE_PAGES):
        os.execve(sys.executable, sys.orig_argv, os.environ | HUGE_PAGES)

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: every option starts with --")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell every file they write
        try:
            return main()
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return 130

    _check_flags()
    app.run(guarded)


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
