"""Equations as MathML: browsers show it by themselves, without the network and without a script."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_log = logging.getLogger(__name__)

_KNOWN = {
    r"\\dots\b": r"\\ldots",
    r"\\[bB]igg?(?![a-zA-Z])": "",
    r"(\\(?:hat|bar|tilde)) *\{?(\w)\}?(?=[_^])": r"{\1{\2}{}}",
}
"""Patterns of LaTeX that docutils does not know or places wrongly, and what it takes instead: other dots, sizes of
delimiters, which grow by themselves, and accents with an index."""


def _made(node: nodes.Node, as_block: bool) -> str:
    text = node.astext()
    for pattern, known in _KNOWN.items():
        text = re.sub(pattern, known, text)
    try:
        return tex2mathml(text, as_block=as_block)
    except MathError as error:
        _log.warning("%s in the equation %s", error, text, location=node)
        return ""


def _inline(writer, node: nodes.math) -> None:
    writer.body.append(_made(node, as_block=False))
    raise nodes.SkipNode


def _block(writer, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{_made(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
