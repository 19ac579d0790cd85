"""What a compiled program holds in memory, read from the buffer assignment that XLA writes."""

import collections
import re
from pathlib import Path
from typing import NamedTuple

_VALUE = re.compile(r" value: <\d+ (\S+?)(\{[\d,]*\})? (?:\(phi\) )?@0> \(size=(\d+),offset=(\d+)\): (\S+?)[{ ]")
_RANGE = re.compile(r"^    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)
_NAME = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


class Buffer(NamedTuple):
    """Arrays alike that live at the fullest moment: what makes them, their shape, how many, and bytes of all."""

    name: str
    shape: str
    number: int
    size: int


class Assignment(NamedTuple):
    """Bytes of one device.

    Attributes:
      arguments: parameters, moments and batch.
      temporaries: what the compiler sets aside for all else.
      largest: arrays at the moment when most of that is in use, largest first.
    """

    arguments: int
    temporaries: int
    largest: list[Buffer]


def read_assignment(assignment: Path, live: Path, hlo: str) -> Assignment:
    """Reads a dumped module's `*-buffer-assignment.txt` and `*-live-range.txt`, with its optimised program."""
    sizes = collections.Counter[str]()
    slots: dict[tuple[int, int], list[tuple[int, int, str, str]]] = collections.defaultdict(list)
    ranges = {(m[1], m[2]): (int(m[3]), int(m[4])) for m in _RANGE.finditer(live.read_text())}
    inside = False
    with assignment.open() as lines:
        for line in lines:
            if line.startswith("allocation"):
                found = re.match(r"allocation \d+: size (\d+), (color \d+, )?page \d+, ([\w-]+)", line)
                inside = False
                if found and not found[2]:
                    sizes[found[3]] += int(found[1])
                    inside = found[3] == "preallocated-temp"
            elif inside and (found := _VALUE.match(line)) and (alive := ranges.get((found[1], found[2] or "{}"))):
                slots[int(found[4]), int(found[3])].append((*alive, found[1], found[5]))
    moment = _fullest(slots)
    names = {match[1]: match[2] for match in _NAME.finditer(hlo)}
    number, total = collections.Counter[tuple[str, str]](), collections.Counter[tuple[str, str]]()
    for (_, size), values in slots.items():
        if here := next((value for value in values if value[0] <= moment <= value[1]), None):
            key = (readable(names.get(here[2], here[2])), here[3])
            number[key] += 1
            total[key] += size
    largest = [Buffer(*key, number[key], size) for key, size in total.most_common()]
    return Assignment(sizes["parameter"], sizes["preallocated-temp"], largest)


def _fullest(slots: dict[tuple[int, int], list[tuple[int, int, str, str]]]) -> int:
    """The moment when the most bytes are in use; values that share a place count once."""
    changes = collections.Counter[int]()
    for (_, size), values in slots.items():
        end = -1
        for first, last, *_ in sorted(values):
            if first > end:
                changes[first] += size
                changes[end + 1] -= size if end >= 0 else 0
            end = max(end, last)
        changes[end + 1] -= size
    used = most = moment = 0
    for when in sorted(changes):
        used += changes[when]
        if used > most:
            most, moment = used, when
    return moment


def readable(name: str) -> str:
    """An operation's name in words, such as `experts: gather (backward)`."""
    direction = "forward"
    if "transpose(" in name:
        direction = "computed again" if "rematted_computation" in name else "backward"
    if not any(mark in name for mark in ("jvp", "transpose", "optimizer")):
        direction = ""
    text = f"{part_of(name)}: {name.split('/')[-1]}"
    return f"{text} ({direction})" if direction else text


PARTS = ("attention", "router", "experts", "shared", "dense", "loss", "embedding", "optimizer")
"""Of a step, as the model names them for the compiler."""


def part_of(name: str) -> str:
    """The part of the model that an operation belongs to; `other` where its name does not tell."""
    if name.startswith(("ragged-dot", "gather_offload")):
        return "experts"
    if name.startswith("splash"):
        return "attention"
    found = re.findall(rf"\b({'|'.join(PARTS)})\b", name)
    return found[-1] if found else "other"
