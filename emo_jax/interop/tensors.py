"""How published weights lie in our parameters.

Published linear weights are [out, in] (GPT-2's layers: [in, out]) and experts are separate tensors, the shared ones
last in each layer's stack. Ours are [in, out], experts stacked, shared experts one feed-forward of width s·F beside
them, without router columns.

The public EMO code weights a token's s shared experts by a softmax over their own s router logits; training, and this
project, use 1 for each. With one shared expert the two agree. With more, the sum is 1 instead of s: reading divides
`down` of the shared experts by s and writing multiplies it. That is exact where their router rows are equal (we write
zeros) and impossible where they are not: such a folder is refused. Both are computed in float32 and rounded to the
tensor's precision: bit for bit invertible where s is a power of two (unless a float16 value gets subnormal), else not.

Letters: D model, H query heads, N head width, E experts, s shared experts, F expert hidden.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from emo_jax.interop.families import Family
from emo_jax.model import ModelConfig
from emo_jax.model.functional import LeafPath, leaf_shapes


class Tensor(NamedTuple):
    """A published tensor, or our parameter's part of one, and where it lies in our parameters.

    Attributes:
      name: published.
      path: of our parameter.
      view: of our parameter (a view, so that it can be written to), in the published layout.
      rows: that the published tensor has, where they are not those of `view`: a router's.
      unrouted: the last so many of them, of the shared experts, which ours has not.
      chosen: which of the others are ours; None: all.
      divisor: ours is the published value divided by it.
      sharing: how many parameters lie in the published tensor, side by side along its last axis, as wide as each other.
      place: of ours among them.
    """

    name: str
    path: LeafPath
    view: Callable[[np.ndarray], np.ndarray]
    rows: int = 0
    unrouted: int = 0
    chosen: tuple[int, ...] | None = None
    divisor: int = 1
    sharing: int = 1
    place: int = 0

    def shape(self, leaf: np.ndarray) -> tuple[int, ...]:
        """Of the published tensor, where `leaf` is our parameter."""
        shape = self.view(leaf).shape
        whole = (self.rows or shape[0], *shape[1:])
        return (*whole[:-1], whole[-1] * self.sharing)

    def where(self, rows: slice, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where some rows of the view, which has this shape, lie in the published tensor."""
        if self.sharing == 1:
            return (rows,)
        start = self.place * shape[-1]
        if len(shape) == 1:
            return (slice(start + rows.start, start + rows.stop),)
        return rows, slice(start, start + shape[-1])

    def published(self, leaf: np.ndarray, *, gradients: bool = False) -> np.ndarray:
        """The published tensor, or our part, contiguous and no view of `leaf`; `gradients` as in `to_public_names`."""
        value = self.view(leaf)
        if self.unrouted:
            value = np.concatenate([value, np.zeros((self.unrouted, value.shape[1]), value.dtype)])
        value = np.array(value, order="C")
        return scaled(value, over=self.divisor) if gradients else scaled(value, times=self.divisor)


def joined(parts: Iterable[tuple[Tensor, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Published tensors by name, each as soon as all parameters that share it were there; those come in their order."""
    waiting: dict[str, list[np.ndarray]] = {}
    for tensor, value in parts:
        if tensor.sharing == 1:
            yield tensor.name, value
            continue
        together = waiting.setdefault(tensor.name, [])
        together.append(value)
        if len(together) == tensor.sharing:
            yield tensor.name, np.concatenate(waiting.pop(tensor.name), axis=-1)


def scaled(value: np.ndarray, times: int = 1, over: int = 1) -> np.ndarray:
    """Returns value · times / over, computed in float32 or wider, in value's dtype."""
    if times == over:
        return value
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return (wide * times / over).astype(value.dtype)


def tensors(config: ModelConfig, family: Family, kept: Sequence[Sequence[int]] | None = None) -> Iterator[Tensor]:
    """Every published tensor of such a model; with `kept`, those of it cut to these experts, ours renumbered."""
    names, here = family.names, family.prefix(config)
    leaves, chosen = leaf_shapes(config), iter(kept or ())
    yield from _modules(names.trunk, here, (), leaves)
    for i, experts in enumerate(config.layer_experts):
        layer, ours = f"{here}{names.layers}.{i}.", ("layers", f"{i:02d}")
        yield from _modules(names.layer, layer, ours, leaves, in_out=family.in_out)
        if experts:
            experts_kept = None if kept is None else tuple(next(chosen))
            yield from _mixture(f"{layer}mlp", (*ours, "moe"), experts, config, experts_kept)
    yield from _modules(names.heads, "", (), leaves)


def _modules(
    names: dict[str, str], here: str, ours: LeafPath, leaves: Container[LeafPath], in_out: bool = False
) -> Iterator[Tensor]:
    """The tensors of some modules, as far as the model has them; see `Names`."""
    for public, own in names.items():
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            paths: list[LeafPath] = [(*ours, *f"{name}{suffix}".split("/")) for name in own.split()]
            for place, path in enumerate(paths):
                if path in leaves:
                    view = _view(path[-1], in_out)
                    yield Tensor(f"{here}{public}.{kind}", path, view, sharing=len(paths), place=place)


def _mixture(
    here: str, ours: LeafPath, experts: int, config: ModelConfig, kept: tuple[int, ...] | None
) -> Iterator[Tensor]:
    """The tensors of one mixture layer of E experts, or of those that are kept."""
    shared, hidden = config.num_shared_experts, config.d_expert
    routed = experts - shared
    yield Tensor(f"{here}.gate.weight", (*ours, "router"), np.transpose, routed + shared, shared, kept)
    for own in ("gate", "up", "down"):
        for place, e in enumerate(range(routed) if kept is None else kept):
            yield Tensor(f"{here}.experts.{e}.{own}_proj.weight", (*ours, "routed", own), _transposed(place))
        for j in range(shared):
            name = f"{here}.experts.{routed + j}.{own}_proj.weight"
            part = slice(j * hidden, (j + 1) * hidden)
            if own == "down":
                yield Tensor(name, (*ours, "shared", own), _transposed(part), divisor=shared)
            else:
                yield Tensor(name, (*ours, "shared", own), _transposed(slice(None), part))


def _transposed(*index: int | slice) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: w[index].T


def _view(name: str, in_out: bool) -> Callable[[np.ndarray], np.ndarray]:
    """The published layout of a parameter: heads are one axis with their width, and matrices transposed or not."""
    if name.endswith("embedding"):
        return lambda w: w
    if name.endswith(("norm", "_bias")):
        return lambda b: b.reshape(-1)
    flat = _heads_in if name == "out" else _heads_out
    return flat if in_out else lambda w: flat(w).T


def _heads_out(w_DHN: np.ndarray) -> np.ndarray:
    """[D, H·N] of a projection to heads; any other matrix as it is."""
    return w_DHN.reshape(w_DHN.shape[0], -1)


def _heads_in(w_HND: np.ndarray) -> np.ndarray:
    """[H·N, D] of the projection from heads."""
    return w_HND.reshape(-1, w_HND.shape[-1])
