"""How many devices a run spreads over, and along which axes."""

import dataclasses

from emo_jax.errors import require

AXES = ("data", "fsdp", "expert")
"""Of the mesh, the slowest first."""


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the device mesh's axes. Rows of a batch are split over all of them."""

    data: int = -1
    """Replicas of the parameters; −1: whatever the devices leave."""
    fsdp: int = 1
    """Shards of every parameter and its optimizer state; −1: whatever the devices leave."""
    expert: int = 1
    """Ranks that each compute their own routed experts, on the tokens of all of them; they also hold shards of every
    parameter, as `fsdp` does. −1: whatever the devices leave."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        for name in AXES:
            value = getattr(self, name)
            require(value >= 1 or value == -1, f"mesh.{name}={value} must be at least 1, or -1 for the rest.")
        rest = [f"mesh.{name}" for name in AXES if getattr(self, name) == -1]
        require(len(rest) <= 1, f"{' and '.join(rest)} are both -1; only one can take what is left.")
