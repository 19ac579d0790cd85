"""How many devices a run spreads over, and along which axes."""

import dataclasses

from emo_jax.errors import require


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the device mesh's axes. Rows of a batch are split over both."""

    data: int = -1
    """Replicas of the parameters; −1: whatever the devices leave."""
    fsdp: int = 1
    """Shards of every parameter and its optimizer state; −1: whatever the devices leave."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        for name in ("data", "fsdp"):
            value = getattr(self, name)
            require(value >= 1 or value == -1, f"mesh.{name}={value} must be at least 1, or -1 for the rest.")
        require(
            not self.data == self.fsdp == -1, "mesh.data and mesh.fsdp are both -1; only one can take what is left."
        )
