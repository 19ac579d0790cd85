"""Where does it live? The device mesh, and one table from what an array axis means to where it is split."""

from emo_jax.parallel.config import MeshConfig
from emo_jax.parallel.embedding import lookup
from emo_jax.parallel.exchange import COMBINED, DISPATCHED, map_experts, rank_load
from emo_jax.parallel.sharding import (
    GATHERED,
    TOKENS,
    batch_sharding,
    make_mesh,
    map_tokens,
    own_rows,
    param_sharding,
    product,
    put_rows,
    replicated,
    rest_spec,
    scattered,
    whole,
)

__all__ = [
    "COMBINED",
    "DISPATCHED",
    "GATHERED",
    "TOKENS",
    "MeshConfig",
    "batch_sharding",
    "lookup",
    "make_mesh",
    "map_experts",
    "map_tokens",
    "own_rows",
    "param_sharding",
    "product",
    "put_rows",
    "rank_load",
    "replicated",
    "rest_spec",
    "scattered",
    "whole",
]
