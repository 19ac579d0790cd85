"""How many devices a run spreads over, along which axes, and how tokens reach their experts."""

import dataclasses

from emo_jax.errors import require, require_choice

AXES = ("data", "fsdp", "expert", "context")
"""Of the mesh, the slowest first."""
EXCHANGES = ("auto", "ring", "all_to_all")


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the device mesh's axes, and what crosses its `expert` axis.

    Rows of a batch are split over data × fsdp × expert, the tokens of a row over `context`.
    """

    data: int = -1
    """Replicas of the parameters; −1: whatever the devices leave. With several TPU slices, the axis between them."""
    fsdp: int = 1
    """Shards of every parameter and its optimizer state; −1: whatever the devices leave."""
    expert: int = 1
    """Ranks that each compute their own routed experts, on the tokens of all of them; they also hold shards of every
    parameter, as `fsdp` does. −1: whatever the devices leave."""
    context: int = 1
    """Parts of a row, each on a device of its own; a document over several has one pool. They also hold shards of
    every parameter. −1: whatever the devices leave."""
    exchange: str = "auto"
    """How tokens reach other ranks' experts. `ring`: all tokens to all ranks, once, and the sums back. `all_to_all`:
    a row for each choice, to its expert's rank. `auto`: the ring up to as many ranks as a token has choices, since it
    sends fewer bytes then."""
    buffer: float = 1.5
    """Choices that a rank computes in one round, over what balanced experts would give it. Further rounds follow until
    all are done (`exchange/rank_rounds` counts them): no token is ever dropped."""
    chunks: int = 1
    """Parts of a device's tokens that visit the experts one after another: an exchange overlaps with another's
    products, and buffers are smaller."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        for name in AXES:
            value = getattr(self, name)
            require(value >= 1 or value == -1, f"mesh.{name}={value} must be at least 1, or -1 for the rest.")
        rest = [f"mesh.{name}" for name in AXES if getattr(self, name) == -1]
        require(len(rest) <= 1, f"{' and '.join(rest)} are both -1; only one can take what is left.")
        require_choice("mesh.exchange", self.exchange, EXCHANGES)
        require(self.buffer >= 1, f"mesh.buffer={self.buffer} must be at least 1: balanced experts fill 1.")
        require(self.chunks >= 1, f"mesh.chunks={self.chunks} must be at least 1.")
