"""How do weights come and go? Hugging Face folders, read without PyTorch and without unpickling anything.

The published names and layouts live here alone; everything else sees this project's parameters.
"""

from emo_jax.interop.huggingface import read_config, read_parameters, read_routers, to_public_names

__all__ = ["read_config", "read_parameters", "read_routers", "to_public_names"]
