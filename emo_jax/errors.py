"""The one exception for mistakes a person can fix: a config value, a file, a flag."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A config or input mistake. Mains print its text, which says what to do, without a traceback."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest_divisors(n: int, total: int, least: int = 1) -> str:
    """The divisors of `total` next to n, from `least` on, in words: one below and one above, where there are any."""
    below, above = ([d for d in some if total % d == 0] for some in (range(n, least - 1, -1), range(n, total + 1)))
    return " or ".join(str(found[0]) for found in (below, above) if found)


def require_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError` unless `value` is one of `choices`; names the nearest one."""
    choices = tuple(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field}={value!r} is not one of {', '.join(map(repr, choices))}.{hint}")
