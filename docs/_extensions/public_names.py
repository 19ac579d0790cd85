"""The directive `exports`, and for it: constants' texts, attributes in our words, links by short name."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode


class Exports(SphinxDirective):
    """What a package is, and every name in its `__all__`; autodoc's own automodule leaves constants out."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (package,) = self.arguments
        module = importlib.import_module(package)
        text = f".. automodule:: {package}\n   :no-members:\n"
        for name in module.__all__:
            if not name.startswith("__"):
                text += f"\n{_directive(getattr(module, name))}".replace("NAME", f"{package}.{name}")
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _directive(exported: object) -> str:
    """What shows the object called NAME."""
    if inspect.ismodule(exported):
        return ".. automodule:: NAME\n"
    if inspect.isclass(exported):
        return f".. auto{'exception' if issubclass(exported, Exception) else 'class'}:: NAME\n"
    if callable(exported):
        return ".. autofunction:: NAME\n"
    if isinstance(exported, dict):
        return f".. autodata:: NAME\n   :no-value:\n\n   Of {', '.join(f'``{key}``' for key in exported)}.\n"
    return ".. autodata:: NAME\n"


def _skip(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Leaves out a named tuple's fields, which its class explains, and other names of types, seen in signatures."""
    return True if type(member).__name__ in ("_tuplegetter", "GenericAlias") else None


_kept: dict[str, list[str]] = {}


def _keep(app: Sphinx, what: str, name: str, member: object, options: object, lines: list[str]) -> None:
    """Remembers an attribute's text: napoleon takes what stands before a colon for its type, as in "V: rows of …"."""
    if what in ("attribute", "property"):
        _kept[name] = list(lines)


def _restore(app: Sphinx, what: str, name: str, member: object, options: object, lines: list[str]) -> None:
    """Puts it back; and gives a constant the text behind its definition, which autodoc seeks in the package alone."""
    if name in _kept:
        lines[:] = _kept.pop(name)
    if what == "class":
        lines[:] = _one_name_each(lines)
    package, _, constant = name.rpartition(".")
    if what == "data" and (module := _origins(package).get(constant)):
        lines[:] = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", constant), [])


def _one_name_each(lines: list[str]) -> list[str]:
    """Splits fields such as `:ivar low, high: …`, whose first name would be taken for a type."""

    def split(match: re.Match) -> str:
        return "".join(f":ivar {name}:{match[2]}" for name in match[1].split(", "))

    return re.sub(r"^:ivar (\w+(?:, \w+)+):(.*\n(?: +.*\n)*)", split, "\n".join([*lines, ""]), flags=re.M).split("\n")


def _resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Element) -> nodes.Node | None:
    """Finds what a docstring calls by its last name alone, where only one object has it."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    name = node["reftarget"].rpartition(".")[2]
    found = {(entry.docname, entry.node_id) for full, entry in objects.items() if full.rpartition(".")[2] == name}
    if len(found) != 1:
        return None
    ((docname, anchor),) = found
    return make_refnode(app.builder, node["refdoc"], docname, anchor, text, name)


@functools.cache
def _origins(package: str) -> dict[str, str]:
    """Modules that a package's names are imported from."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return {}
    imports = [n for n in ast.parse(Path(spec.origin).read_text("utf-8")).body if isinstance(n, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names if node.module}


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.add_directive("exports", Exports)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _keep, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", _restore, priority=900)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
