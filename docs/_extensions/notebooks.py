"""Brings `notebooks/` of the repository under `docs/`, since Sphinx reads no pages from elsewhere.

The directive `notebooks` lists them in the sidebar, where there are any.
"""

import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Notebooks(SphinxDirective):
    """A hidden toctree of all notebooks, for a page in Markdown; nothing where there are none."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # another time there may be others
        names = sorted(file.stem for file in (Path(self.env.srcdir) / "notebooks").glob("*.ipynb"))
        entries = "".join(f"notebooks/{name}\n" for name in names)
        toctree = f"```{{toctree}}\n:caption: Notebooks\n:hidden:\n\n{entries}```\n"
        return self.parse_text_to_nodes(toctree) if names else []


def _bring(app: Sphinx) -> None:
    """Copies what is new, and takes away what is gone."""
    source, target = Path(app.srcdir).parent / "notebooks", Path(app.srcdir) / "notebooks"
    wanted = {file.name: file for file in sorted(source.glob("*.ipynb"))}
    for old in target.glob("*.ipynb"):
        if old.name not in wanted:
            old.unlink()
    for name, file in wanted.items():
        target.mkdir(exist_ok=True)
        if not (target / name).exists() or (target / name).read_bytes() != file.read_bytes():
            shutil.copyfile(file, target / name)


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.add_directive("notebooks", Notebooks)
    app.connect("builder-inited", _bring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
