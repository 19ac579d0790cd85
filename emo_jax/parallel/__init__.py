"""Where does it live? The device mesh, and one table from what an array axis means to where it is split."""

from emo_jax.parallel.config import MeshConfig
from emo_jax.parallel.exchange import map_experts, ring_load
from emo_jax.parallel.sharding import batch_sharding, make_mesh, map_rows, param_sharding, put_rows, replicated

__all__ = [
    "MeshConfig",
    "batch_sharding",
    "make_mesh",
    "map_experts",
    "map_rows",
    "param_sharding",
    "put_rows",
    "replicated",
    "ring_load",
]
