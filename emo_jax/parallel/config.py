"""How many devices a run spreads over, and along which axes."""

import dataclasses

from emo_jax.errors import require


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the device mesh's axes. Rows of a batch are split over both."""

    data: int = -1
    """Replicas of the parameters; −1: whatever the devices leave."""
    fsdp: int = 1
    """Shards of every parameter and its optimizer state."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        require(self.fsdp >= 1, f"mesh.fsdp={self.fsdp} must be at least 1.")
        require(self.data >= 1 or self.data == -1, f"mesh.data={self.data} must be at least 1, or -1 for the rest.")
