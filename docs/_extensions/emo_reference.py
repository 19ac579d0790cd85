"""Reference pages made of the code itself: commands of their flags, fields of the config's dataclasses, config files.

Directives `commands`, `config-fields` and `config-files`; the role `config` refers to a field, as `model.num_experts`.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import absl.app  # defines flags of its own, which no program's section lists
from absl import flags
from ml_collections import config_flags  # noqa: F401  (likewise)
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import emo_jax
from emo_jax.config import Config

absl.app.define_help_flags()
PACKAGE = Path(emo_jax.__file__).parent


def programs() -> list[str]:
    """Names of the package's modules that a person runs."""
    return sorted(file.stem for file in PACKAGE.glob("*.py") if '__name__ == "__main__"' in file.read_text("utf-8"))


class _Made(SphinxDirective):
    """Sections of text that `make` returns, with the files that it read."""

    def run(self) -> list:
        text, files = self.make()
        for file in files:
            self.env.note_dependency(str(file))
        return self.parse_text_to_nodes(text, allow_section_headings=True)

    def make(self) -> tuple[str, list[Path]]:
        raise NotImplementedError


class Commands(_Made):
    """A section for each program of the package: its docstring, and its flags."""

    def make(self) -> tuple[str, list[Path]]:
        files = [PACKAGE / f"{program}.py" for program in programs()]
        return "\n".join(map(_command, programs())), files


class ConfigFields(_Made):
    """A section for each part of `Config`, with its fields, their types and defaults."""

    def make(self) -> tuple[str, list[Path]]:
        parts = {field.name: field.default_factory for field in dataclasses.fields(Config)}
        files = {ModuleAnalyzer.for_module(part.__module__).srcname for part in parts.values()}
        return "\n".join(_part(name, part) for name, part in parts.items()), [Path(file) for file in files]


class ConfigFiles(_Made):
    """A section for each file in `configs/`."""

    def make(self) -> tuple[str, list[Path]]:
        files = sorted((PACKAGE.parent / "configs").glob("*.py"))
        made = [
            f"{_heading(file.name)}\n.. code-block:: python\n\n{_indented(file.read_text('utf-8'))}\n" for file in files
        ]
        return "\n".join(made), files


@functools.cache
def _flags(program: str) -> tuple[str, list[flags.Flag]]:
    """A program's docstring and its flags, in the order of their definition."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f"emo_jax.{program}")
    new = [flags.FLAGS[name] for name in flags.FLAGS if name not in before]
    for flag in new:  # another program may have a flag of that name
        delattr(flags.FLAGS, flag.name)
    return module.__doc__ or "", new


def _command(program: str) -> str:
    doc, found = _flags(program)
    text = f"{_heading(f'emo_jax.{program}')}\n{doc}\n\n.. program:: emo_jax.{program}\n"
    for flag in found:
        text += f"\n.. option:: --{flag.name}{_value(flag)}\n\n   {_plain(flag.help or '')}{_default(flag)}\n"
    return text


def _value(flag: flags.Flag) -> str:
    if flag.name == "config":
        return "=FILE, --config.SECTION.FIELD=VALUE" if flag.default is None else ".SECTION.FIELD=VALUE"
    if flag.boolean:
        return f", --no{flag.name}"
    kinds = {"comma separated list of strings": "A,B,…", "multi string": "TEXT", "string": "TEXT", "float": "NUMBER"}
    return "=" + kinds.get(flag.flag_type(), "N")


def _default(flag: flags.Flag) -> str:
    if flag.name == "config":
        return " Any field of :doc:`the config <config>` can be set."
    if flag.default is None:
        return " **Must be given.**"
    if flag.boolean:
        return f" On unless ``--no{flag.name}`` is given." if flag.default else " Off unless it is given."
    default = ",".join(flag.default) if isinstance(flag.default, list) else str(flag.default)
    repeated = " May be given several times." if flag.flag_type().startswith("multi") else ""
    return repeated + (f" Default: ``{default}``." if default else "")


def _part(name: str, part: type) -> str:
    docs = ModuleAnalyzer.for_module(part.__module__).find_attr_docs()
    text = f"{_heading(name)}\n{inspect.cleandoc(part.__doc__ or '')}\n"
    for field in dataclasses.fields(part):
        kind = field.type.__name__ if isinstance(field.type, type) and "[" not in str(field.type) else str(field.type)
        doc = "\n".join(docs[part.__name__, field.name])
        text += f"\n.. config:: {name}.{field.name}: {kind} = {field.default!r}\n\n{_indented(doc)}\n"
    return text


def _signature(env, text: str, node: addnodes.desc_signature) -> str:
    """Lays out `name: type = default`, and returns the name."""
    name, kind, default = re.fullmatch(r"([\w.]+): (.*?) = (.*)", text, re.DOTALL).groups()
    node += addnodes.desc_name(name, name)
    node += addnodes.desc_annotation("", f": {kind} = {default}")
    return name


def _heading(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n"


def _indented(text: str) -> str:
    return "\n".join(f"   {line}" if line else "" for line in text.splitlines())


def _plain(text: str) -> str:
    """A flag's help as markup: other flags as code, and nothing else with a meaning."""
    pieces = re.split(r"(--\w[\w=.:]*\w)", text)
    return "".join(f"``{p}``" if p.startswith("--") else re.sub(r"([\\`*_|<>])", r"\\\1", p) for p in pieces)


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.add_object_type("config", "config", "pair: %s; config field", _signature)
    app.add_directive("commands", Commands)
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("config-files", ConfigFiles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
