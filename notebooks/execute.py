"""Executes notebooks at the size they are committed at, and saves them: `python notebooks/execute.py [NAME ...]`.

Without names all, in an order in which later ones use the models of earlier ones. What they write is kept in
`notebooks/runs`; delete that to begin anew.
"""

import ast
import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
ORDER = ("quickstart", "explore", "released_checkpoint", "how_it_works")
"""Of all notebooks."""


def execute(notebook: Path, folder: Path, parameters: dict[str, Any] | None = None) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in `folder` by a kernel of its own.

    Args:
      notebook: its file, which stays as it is.
      folder: that its relative paths are of.
      parameters: new values of names that the cell tagged "parameters" sets.

    Raises:
      nbclient.exceptions.CellExecutionError: where a cell raises.
    """
    read = nbformat.read(notebook, as_version=4)
    source = {cell.id: cell.source for cell in read.cells}
    if parameters:
        (cell,) = (cell for cell in read.cells if "parameters" in cell.metadata.get("tags", []))
        known = {target.id for line in ast.parse(cell.source).body for target in line.targets}
        assert set(parameters) <= known, f"{notebook.name} has the parameters {known}, not {set(parameters) - known}"
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(
        read,
        kernel_name="python3",
        timeout=3600,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for output in (output for cell in read.cells for output in cell.get("outputs", [])):
        assert output.output_type != "error", output  # one that is met while a figure is drawn stops nothing
    for cell in read.cells:
        cell.source = source[cell.id]
    # Without the versions, which are the machine's and change with it.
    read.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return read


def save(notebook: nbformat.NotebookNode, file: Path) -> None:
    """Writes a notebook, its figures with fewer colours: a third of the size, and nobody sees it."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                small = io.BytesIO()
                picture.quantize(160, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(small.getvalue()).decode()
    nbformat.validate(notebook)
    file.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def main(names: list[str]) -> None:
    """Executes and saves."""
    for name in names or ORDER:
        print(name, flush=True)
        save(execute(FOLDER / f"{name}.ipynb", FOLDER), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
