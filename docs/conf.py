"""How the documentation is built: `make docs`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]
import emo_jax  # noqa: E402  (this one, not another that is installed)

project = "emo_jax"
author = copyright = "The emo_jax authors"
release = version = emo_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "emo_reference",
    "mathml",
    "notebooks",
    "public_names",
]
exclude_patterns = ["_build", "_extensions"]
nitpicky = True
# Objects of other projects, which have no pages here: without the network there is nothing to link them to.
nitpick_ignore_regex = [
    (r"py:.*", rf"{package}\..*")
    for package in ("collections", "flax", "grain", "jax", "np", "numpy", "optax", "os", "pathlib", "tokenizers")
]
# Types of arguments and results that no package exports: what one passes on, and need not know.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "Log",
        "Shards",
        "emo_jax.data.config.Part",
        "emo_jax.data.prepared.Shards",
        "emo_jax.model.attention.KeyValues",
        "emo_jax.model.attention.Past",
        "emo_jax.modularity.clustering.Coactivation",
        "emo_jax.parallel.chips.Chip",
        "emo_jax.planning.buffers.Buffer",
        "emo_jax.planning.cost.Flops",
        "emo_jax.planning.cost.Work",
        "emo_jax.planning.memory.Memory",
        "emo_jax.planning.roofline.Operations",
    )
]

highlight_language = "none"  # blocks without a language are commands
default_role = "literal"  # docstrings write code in single backticks
smartquotes_action = "D"  # dashes alone
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a dataclass or named tuple, whose fields autodoc finds too
napoleon_attr_annotations = False  # their types stand in the signature
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs

html_theme = "furo"
html_title = "emo_jax"
html_static_path = ["_static"]
html_css_files = ["emo_jax.css"]
html_show_sphinx = False
