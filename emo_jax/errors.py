"""The one exception for mistakes a person can fix: a config value, a file, a flag."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A config or input mistake. Mains print its text, which says what to do, without a traceback."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError` unless `value` is one of `choices`; names the nearest one."""
    choices = tuple(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field}={value!r} is not one of {', '.join(map(repr, choices))}.{hint}")
