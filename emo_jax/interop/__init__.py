"""How do weights come and go? Hugging Face folders, read and written without PyTorch and without unpickling anything.

Published names and layouts live in `families`, `fields` and `tensors` alone; everything else sees our parameters.
"""

from emo_jax.interop.huggingface import (
    abstract_leaves,
    missing_leaves,
    read_config,
    read_leaves,
    read_parameters,
    read_routers,
    read_unrouted,
    to_public_names,
)
from emo_jax.interop.writing import copy_small_files, require_new, write_folder

__all__ = [
    "abstract_leaves",
    "copy_small_files",
    "missing_leaves",
    "read_config",
    "read_leaves",
    "read_parameters",
    "read_routers",
    "read_unrouted",
    "require_new",
    "to_public_names",
    "write_folder",
]
