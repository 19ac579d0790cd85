"""What a compiled step does, read from its HLO: what crosses the mesh, along which axes, and the products it computes.

A compiler's own cost analysis counts the body of a loop once, whatever its length, and knows nothing of mesh axes.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from emo_jax.kernels.experts.tpu_products import PRODUCTS
from emo_jax.kernels.experts.tpu_rows import MOVES

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_FREE |= {"async-start", "async-update"}
"""Operations that move nothing: their arrays are where they were, or their bodies are counted."""
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_GOES_ON = "async_collective_fusion"
_PLACED = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\](\{[^}]*\})?")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \((.*)\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|async_execution_thread)=\{?%?([\w.-]+)")


class Collective(NamedTuple):
    """One exchange among devices.

    Attributes:
      kind: as HLO calls it, one of `COLLECTIVES`.
      axes: of the mesh, that it runs along; ("?",) where its groups are those of no axes.
      sent: bytes that leave a device in one run, if no rows are empty and messages go around a ring.
      times: runs a step; 0 in a loop whose length is known only as it runs, such as further rounds of experts.
      name: of the operation that it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    sent: float
    times: int
    name: str


class Products(NamedTuple):
    """FLOPs a step and device, of matrix products by the compiler and of grouped ones by kernels."""

    dense: float
    grouped: float


def collectives(hlo: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """All collectives of a compiled step, but those that move no more than 4 KiB in one run."""
    groups = _axis_groups(mesh)
    operations = _operations(hlo)
    callers = {called: op.name for op in operations if op.kind == "fusion" for called in _CALLED.findall(op.text)}
    found = []
    for op in operations:
        kind = op.kind.removesuffix("-start")
        if kind not in COLLECTIVES or op.kind.endswith("-done"):
            continue
        if callers.get(op.within, "").startswith("async-collective-done") or op.within.startswith(_GOES_ON):
            continue  # of one that was counted where it starts
        axes = _axes(op.text, mesh, groups)
        members = math.prod(mesh.shape[axis] for axis in axes) if axes != ("?",) else mesh.size
        result = op.result.split(", u32[]")[0] if op.kind.endswith("-start") else op.result
        sizes: list[float] = [_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(result)]
        if kind == "ragged-all-to-all":  # of its rows, not of the larger buffer that they come from or fill
            sizes = [min(_bytes(*operand) for operand in op.operands[:2])]
        elif op.kind.endswith("-start"):
            sizes = sizes[len(sizes) // 2 :]  # operands first, then results
        share = (members - 1) / members
        if op.within.startswith("all-reduce-scatter"):  # which a TPU computes as one, without the whole sum
            kind, sizes = "reduce-scatter", [size / members for size in sizes]
        factor = {"all-reduce": 2 * share, "reduce-scatter": members - 1, "collective-permute": 1}.get(kind, share)
        if sum(sizes) > 4096:
            found.append(Collective(kind, axes, sum(sizes) * factor, op.times, op.name))
    return found


def products(hlo: str) -> Products:
    """The matrix products of a compiled step, times their runs; those of attention kernels are not among them."""
    dense = grouped = 0.0
    for op in _operations(hlo):
        if op.kind in ("dot", "convolution"):
            dense += op.times * _product(op)
        elif _is_grouped(op):
            grouped += op.times * _grouped(op)
    return Products(dense, grouped)


def _product(op: "_Operation") -> float:
    """FLOPs of a dot or a convolution."""
    left, right = (math.prod(_shape(shape)) for _, shape in op.operands[:2])
    out, batch = math.prod(_result(op)), math.prod(_batch(op))
    # out = batch·m·n, left = batch·m·k, right = batch·k·n
    return 2 * out * math.sqrt(left * right / (out * batch)) if out else 0.0


def _is_grouped(op: "_Operation") -> bool:
    return op.kind == "custom-call" and op.name.startswith(("ragged-dot", *PRODUCTS)) and "metadata" not in op.name


def _estimate(op: "_Operation", what: str) -> float:
    """What our own kernels say of themselves: `flops`, or `bytes_accessed`."""
    found = re.search(rf'"cost_estimate":{{[^}}]*"{what}":"(\d+)"', op.text)
    return float(found[1]) if found else 0.0


def _grouped(op: "_Operation") -> float:
    """FLOPs of a grouped product, over all its rows."""
    if op.name.startswith(PRODUCTS):
        return _estimate(op, "flops")
    given = _ARRAY.findall(op.text.split("operand_layout_constraints={")[1].split("}}")[0])
    a, b = (_shape(shape) for _, shape in given[-2:])
    rows, width = a
    return 2 * rows * width * (b[1] if len(_result(op)) == 3 else b[2])


class Work(NamedTuple):
    """Of one operation, fused or not, in all its runs of a step.

    Attributes:
      name: where it comes from, such as `jit(train_step)/jvp(layer_03)/experts/…`; else its own.
      flops: of its matrix products; six times as many for those in float32, which a TPU makes of bfloat16 ones.
      grouped: whether they are of groups of rows, of which kernels visit those that have tokens alone.
      traffic: bytes that it reads from HBM and writes there.
    """

    name: str
    flops: float
    grouped: bool
    traffic: float


def work(hlo: str) -> list[Work]:
    """What a compiled step's operations do, one after another; attention kernels have no FLOPs here.

    What lies in a faster memory costs no bytes, and of a slice or a gather only what is taken. Arrays that a kernel
    reads more than once, or in part, count once and whole.
    """
    operations = _operations(hlo)
    bodies: dict[str, list[_Operation]] = {}
    for op in operations:
        bodies.setdefault(op.within, []).append(op)
    fused = {called for op in operations if op.kind == "fusion" for called in _CALLED.findall(op.text)}
    fused |= set(re.findall(r"to_apply=%?([\w.-]+)", hlo))
    found = []
    for op in operations:
        if op.kind in _FREE or op.kind.endswith("-done") or op.within in fused or not op.times:
            continue
        flops = _flops(op)
        if op.kind == "fusion":
            body = bodies.get(_CALLED.findall(op.text)[0], [])
            read, written = _fusion_bytes(op, body)
            flops = sum(map(_flops, body))
        elif op.kind in ("dynamic-slice", "gather", "slice"):
            read = written = _hbm(op.result)
        elif op.kind == "dynamic-update-slice":
            read = written = _hbm(op.inputs[1])
        elif op.kind == "custom-call" and op.name.startswith((*PRODUCTS, *MOVES)):  # of slots, those that are filled
            read, written = _estimate(op, "bytes_accessed"), 0.0
        elif op.kind.endswith("-start"):  # (operands, results, …): both, once
            read, written = 0.0, _hbm(op.result)
        elif op.kind == "call-update" and op.name.startswith("gather"):  # by a sparse core: ((operands), what is taken)
            read = written = _hbm(op.result.rpartition(")")[0].rpartition("), ")[2])
        else:
            read, written = sum(map(_hbm, op.inputs)), _hbm(op.result)
        named = re.search(r'op_name="([^"]*)"', op.text)
        name = named[1] if named else op.name
        found.append(Work(name, op.times * flops, _is_grouped(op), op.times * (read + written)))
    return found


def _flops(op: "_Operation") -> float:
    if op.kind in ("dot", "convolution"):
        return _product(op) * (6 if "operand_precision={highest" in op.text else 1)
    return _grouped(op) if _is_grouped(op) else 0.0


def _fusion_bytes(fusion: "_Operation", body: "list[_Operation]") -> tuple[float, float]:
    """Read and written by a fusion, given the operations inside."""
    read, written = 0.0, _hbm(fusion.result)
    parameters = {op.name: op for op in body if op.kind == "parameter"}
    for name, parameter in parameters.items():
        index = int(re.findall(r"parameter\((\d+)\)", parameter.text)[0])
        size = _hbm(fusion.inputs[index]) if index < len(fusion.inputs) else 0.0
        users = [op for op in body if name in op.given]
        if (
            size
            and users
            and all(op.kind in ("dynamic-slice", "gather", "slice") and op.given[0] == name for op in users)
        ):
            size = min(size, sum(_size(op.result) for op in users))
        elif size and users and all(op.kind == "dynamic-update-slice" and op.given[0] == name for op in users):
            size = 0.0  # written in place
        read += size
    for op in body:
        if op.kind == "dynamic-update-slice" and op.text.lstrip().startswith("ROOT"):
            written = min(written, _size(op.inputs[1]))
    return read, written


def _hbm(types: str) -> float:
    """Bytes of those arrays that lie in HBM: others name another memory space."""
    return sum(_bytes(dtype, shape) for dtype, shape, layout in _PLACED.findall(types) if "S(" not in layout)


def _size(types: str) -> float:
    return sum(_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(types))


class _Operation(NamedTuple):
    name: str
    result: str
    kind: str
    text: str
    given: list[str]
    inputs: list[str]
    times: int
    within: str

    @property
    def operands(self) -> list[tuple[str, str]]:
        """Dtype and shape of each argument that is one array."""
        return [(found[1], found[2]) for kind in self.inputs if (found := _ARRAY.search(kind))]


@functools.lru_cache(maxsize=1)
def _operations(hlo: str) -> list[_Operation]:
    """Every operation of the module, with its operands' types and how often it runs; kept, since several ask."""
    return list(_parse(hlo))


def _parse(hlo: str) -> Iterator[_Operation]:
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = [line]
            entry = current if header[1] else entry
        elif current:
            computations[current].append(line)
    times = dict.fromkeys(computations, 0)

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for line in computations[name][1:]:
            if " while(" in line:
                condition, body = (re.findall(rf"{key}=%?([\w.-]+)", line)[0] for key in ("condition", "body"))
                visit(body, runs * _length(line, computations[condition]))
            else:
                for called in _CALLED.findall(line):
                    if called in computations:
                        visit(called, runs)

    visit(entry, 1)
    for name, lines in computations.items():
        types: dict[str, str] = {}
        for parameter, kind in re.findall(r"([\w.-]+): ((?:\w+)\[[\d,]*\])", lines[0]):
            types[parameter] = kind
        for line in lines[1:]:
            if not (match := _OP.match(line)):
                continue
            types[match[1]] = match[2]
            references = re.findall(r"%([\w.-]+)(?:#(\d+))?", match[4].split("), ")[0])
            given = [operand for operand, _ in references]
            inputs = [_element(types.get(operand, ""), index) for operand, index in references]
            yield _Operation(match[1], match[2], match[3], line, given, inputs, times[name], name)


def _element(types: str, index: str) -> str:
    """The type of one element of a tuple, which dumps write as `%tuple#2`; the type itself without an index."""
    if not index:
        return types
    parts, depth, start = [], 0, 1
    for place, character in enumerate(types):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(types[start:place])
            start = place + 1
    return parts[int(index)] if int(index) < len(parts) else ""


def _length(loop: str, condition: list[str]) -> int:
    """Of a loop that counts up to a constant; 0 where it does not."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    text = "\n".join(condition)
    constants = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)
    return int(constants[0]) if len(constants) == 1 and re.search(r"compare\(.*direction=LT", text) else 0


def _result(op: _Operation) -> tuple[int, ...]:
    return _shape(_ARRAY.findall(op.result)[0][1])


def _batch(op: _Operation) -> tuple[int, ...]:
    """Sizes of a dot's batch axes."""
    found = re.search(r"lhs_batch_dims=\{([\d,]+)\}", op.text)
    shape = _shape(op.operands[0][1])
    return tuple(shape[int(axis)] for axis in found[1].split(",")) if found else ()


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bytes(dtype: str, shape: str) -> int:
    return BYTES.get(dtype, 4) * math.prod(_shape(shape))


def _axis_groups(mesh: Mesh | AbstractMesh) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    """From groups of devices, numbered in mesh order, to the axes that they lie along; axes of one device left out."""
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    counts = range(1, len(axes) + 1)
    sizes = dict(mesh.shape)
    return {_along(sizes, some): some for count in counts for some in itertools.combinations(axes, count)}


def _along(sizes: dict[str, int], axes: Sequence[str]) -> frozenset[frozenset[int]]:
    """Groups of devices that differ in these axes alone, of all axes' sizes."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    last = [list(sizes).index(axis) for axis in axes]
    rest = [i for i in range(ids.ndim) if i not in last]
    return _as_groups(ids.transpose(*rest, *last).reshape(-1, math.prod(sizes[axis] for axis in axes)))


def _as_groups(rows: np.ndarray | list[tuple[int, ...]]) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(int(device) for device in row) for row in rows)


def _axes(
    text: str, mesh: Mesh | AbstractMesh, groups: dict[frozenset[frozenset[int]], tuple[str, ...]]
) -> tuple[str, ...]:
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        found = _along(sizes, re.findall(r"'(\w+)'", named[2]))
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(mesh.size).reshape(_shape(iota[3]))
        ids = ids.transpose(_shape(iota[4])) if iota[4] else ids
        found = _as_groups(ids.reshape(int(iota[1]), int(iota[2])))
    elif listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text):
        found = _as_groups([_shape(row) for row in re.findall(r"\{([\d,]+)\}", listed[1])])
    elif pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text):
        return _permuted(re.findall(r"\{(\d+),(\d+)\}", pairs[1]), mesh)
    else:
        return ("?",)
    return groups.get(found, ("?",))


def _permuted(pairs: list[tuple[str, str]], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes along which a sender and its receiver differ."""
    shape = tuple(mesh.shape.values())
    used = set()
    for source, target in pairs:
        places = (np.unravel_index(int(device), shape) for device in (source, target))
        used |= {axis for axis, a, b in zip(mesh.axis_names, *places, strict=True) if a != b}
    return tuple(axis for axis in mesh.axis_names if axis in used)
