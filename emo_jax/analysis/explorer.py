"""A page to look around in: what clusters of tokens hold, how models split the same text, what each expert is used for.

Letters: N tokens, K clusters, V different tokens, D domains, L mixture layers, R routed experts, C choices.
"""

import base64
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emo_jax.analysis import page
from emo_jax.analysis.clusters import Clusters
from emo_jax.analysis.figures import DOMAIN_COLOURS
from emo_jax.analysis.reading import Reading, Text
from emo_jax.analysis.report import write_page
from emo_jax.analysis.specialisation import chance_lift
from emo_jax.errors import require

BUDGET = 9_500_000
"""Bytes of a page, so that it can be mailed. Documents have half of what figures leave, at most; the experts of their
tokens have the rest."""
_ASSETS = Path(__file__).with_name("assets")
_SCRIPTS = ("data", "view", "charts", "tokens", "clusters", "documents", "domains", "experts", "main")
_WORDS = 12
"""Tokens named for each cluster."""


class Explored(NamedTuple):
    """A model as the page shows it.

    Attributes:
      reading: of the documents.
      clusters: of its tokens.
      numbers: the model's part of `analysis.json`.
    """

    reading: Reading
    clusters: Clusters
    numbers: dict[str, Any]


def write_explorer(
    path: Path, documents: Sequence[Text], models: Sequence[Explored], prose: Collection[str] = ()
) -> Path:
    """Writes one page, which opens from disk and fetches nothing; one that was there is replaced atomically.

    Where all would exceed `BUDGET`, documents are left out evenly, and with them the experts of their tokens; sizes,
    words and figures are of all documents anyway. The page says so.

    Args:
      path: of the page.
      documents: that all models read.
      models: one or more; their names differ.
      prose: domains that the headline's second column is about.

    Raises:
      UserError: where there is no model, or two have one name.
    """
    names = [model.reading.name for model in models]
    require(bool(names), "There is no model to look at.")
    require(len(set(names)) == len(names), f"Models must have different names; these are {', '.join(names)}.")
    payload: dict[str, Any] = {
        "domains": sorted({document.domain for document in documents}),
        "colours": DOMAIN_COLOURS,
        "models": [_model(model, documents) for model in models],
    }
    head, tail = _frame(documents, models, prose)
    room = BUDGET - len((head + tail + _json(payload)).encode())
    shown = _evenly(len(documents), room / 2 / max(_text_bytes(documents, models), 1))
    payload |= {
        "total": len(documents),
        "number": _pack(shown + 1),
        "domain": _pack([payload["domains"].index(documents[n].domain) for n in shown]),
    }
    for place, model in zip(payload["models"], models, strict=True):
        place |= _texts(model, shown)
    room -= sum(len(_json(_texts(model, shown)).encode()) for model in models)
    traced = shown[_evenly(len(shown), room / max(sum(_chosen_bytes(model, shown) for model in models), 1))]
    for place, model in zip(payload["models"], models, strict=True):
        place["chosen"] = _chosen(model, traced)
    payload["traced"] = _pack(np.searchsorted(shown, traced))
    return write_page(Path(path), head + _json(payload) + tail)


def _frame(documents: Sequence[Text], models: Sequence[Explored], prose: Collection[str]) -> tuple[str, str]:
    """The page before and behind its data."""
    style = page.STYLE + _asset("explorer.css")
    script = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    names = " and ".join(model.reading.name for model in models)
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{page.escape(f'Experts of {names}')}</title>\n<style>{style}</style></head>\n"
        f"<body><main>{_header(documents, models, prose)}{_asset('explorer.html')}</main>\n"
        '<script type="application/json" id="data">'
    )
    library = _asset("vendor/echarts.min.js")
    return head, f"</script>\n<script>{library}</script>\n<script>(() => {{\n{script}}})();</script></body></html>\n"


def _header(documents: Sequence[Text], models: Sequence[Explored], prose: Collection[str]) -> str:
    domains = len({document.domain for document in documents})
    tokens = max(int(np.bincount(model.reading.document_N).max()) for model in models)
    about = (
        f"The first tokens, at most {tokens:,}, of {len(documents):,} documents"
        f"{f' of {domains} domains' * (domains > 1)}. A token is seen as its router probabilities in all layers; "
        "tokens that are routed alike make a cluster."
    )
    kept = "".join(
        f"<li><b>{page.escape(reading.name)}</b>: {len(reading.token_N):,} tokens in {len(clusters.size_K)} clusters, "
        f"of {clusters.dimensions} dimensions with {clusters.variance:.0%} of the variance</li>"
        for reading, clusters, _ in models
    )
    explanation, table = _headline([model.numbers for model in models], prose)
    return (
        f'<header class="split"><div><h1>What experts mean</h1><p>{page.escape(about)}</p>'
        f'<ul class="soft hint">{kept}</ul><p class="soft hint" id="sampled"></p>'
        f'<p class="soft hint">{page.escape(explanation)}</p></div>{table}</header>'
    )


def _headline(models: Sequence[dict[str, Any]], prose: Collection[str]) -> tuple[str, str]:
    """What the main numbers of `analysis.json` are, as text, and their table, as HTML."""
    parts = {"all": models, "prose": [model["prose"] for model in models]}
    parts = {name: part for name, part in parts.items() if all(numbers and numbers["mutual"] for numbers in part)}
    if "all" not in parts:
        return "The documents are of one domain: nothing says how well experts tell domains apart.", ""
    order = [numbers for own in zip(*parts.values(), strict=True) for numbers in own]
    rows = [_rows_of("What experts tell, as a share of their entropy", 1 + len(order))]
    for name, what in (("domain_given_token", "domain | token"), ("domain", "domain"), ("token", "token")):
        rows.append(_row(f"I(expert; {what})", [(f"{100 * numbers['mutual'][name]:.1f} %", "") for numbers in order]))
    for kind, title in (("clusters", "Clusters of tokens"), ("document_clusters", "Clusters of documents")):
        rows.append(_rows_of(f"{title} and domains", 1 + len(order)))
        for name, what in (("nmi", "NMI"), ("ari", "adjusted Rand index"), ("purity", "purity")):
            found = [(numbers[kind][name], numbers[kind]["permuted"][name][0]) for numbers in order]
            rows.append(_row(what, [(f"{value:.2f}", f"({round(chance, 2) + 0.0:.2f})") for value, chance in found]))
    explanation = (
        "I(expert; domain) is how much the choice of experts tells about a document's domain, less what chance gives; "
        "“domain | token” is what it tells beyond the token itself. In brackets is chance: documents, whole, have each "
        "other's domains."
    )
    if "prose" in parts:
        explanation += f" Prose is clustered anew: {', '.join(sorted(prose))}."
    group = f'<th class="group" colspan="{len(parts)}" scope="colgroup">'
    names = "".join(f"{group}{page.escape(model['name'])}</th>" for model in models)
    heads = "".join(f'<th class="number" scope="col">{part}</th>' for part in parts) * len(models)
    return explanation, (
        f'<div class="card headline scroll"><table><thead><tr><td></td>{names}</tr>'
        f'<tr><th scope="col">measure</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _rows_of(title: str, columns: int) -> str:
    return f'<tr><th class="title" colspan="{columns}" scope="colgroup">{page.escape(title)}</th></tr>'


def _row(name: str, cells: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f'<td class="number"><b>{value}</b> <small>{detail}</small></td>' for value, detail in cells)
    return f'<tr><th scope="row">{page.escape(name)}</th>{shown}</tr>'


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that no text in it can end or comment out, and that UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _pack(values: Any, kind: str = "") -> dict[str, str]:
    """An array as base64; unsigned integers in as few bytes as hold them all, or `kind` of little-endian numbers."""
    array = np.asarray(values)
    kind = kind or next(k for k in ("u1", "u2", "u4") if array.max(initial=0) < 256 ** int(k[1]))
    return {"kind": kind, "data": base64.b64encode(array.astype(f"<{kind}").tobytes()).decode()}


def _numbers(matrix: Any) -> dict[str, str]:
    """Half floats: three digits, as much as a colour or a tooltip shows. What is missing or infinite is NaN."""
    array = np.array(matrix, np.float64)  # None becomes NaN
    return _pack(np.where(np.abs(array) < 65504, array, np.nan), "f2")


def _evenly(total: int, share: float) -> np.ndarray:
    """That share of range(total), evenly spread."""
    kept = min(max(int(total * share), 1), total)
    return np.linspace(0, total - 1, kept).round().astype(np.int64)


def _model(model: Explored, documents: Sequence[Text]) -> dict[str, Any]:
    """What does not depend on the documents shown."""
    reading, clusters, numbers = model
    names = sorted({document.domain for document in documents})
    domain_N = np.array([names.index(document.domain) for document in documents])[reading.document_N]
    count = len(clusters.size_K)
    in_domain_KD = np.bincount(clusters.label_N * len(names) + domain_N, minlength=count * len(names))
    _, first_V, token_N = np.unique(reading.token_N, return_index=True, return_inverse=True)
    word_V = [reading.pieces[n] for n in first_V]
    layers = []
    for layer, chosen_NC in zip(numbers["layers"], reading.chosen_LNC, strict=True):
        layers.append(
            {name: _numbers(layer[name]) for name in ("probability", "use", "load", "similarity", "lift")}
            | {name: layer[name] for name in ("order", "block", "coverage", "entropy", "top_tokens")}
            | {"chance": chance_lift(len(layer["order"]), chosen_NC.shape[1]) if len(layer["order"]) > 1 else 0}
        )
    return {
        "name": reading.name,
        "domains": numbers["domains"],
        "size": clusters.size_K.tolist(),
        "in_domain": _pack(in_domain_KD),
        "words": _telling(clusters.label_N, count, token_N, word_V),
        "layers": layers,
    }


def _telling(label_N: np.ndarray, clusters: int, token_N: np.ndarray, word_V: Sequence[str]) -> list[list[str]]:
    """The tokens that tell each cluster from all: those that add most to KL(its tokens ‖ all tokens)."""
    count_KV = np.bincount(label_N.astype(np.int64) * len(word_V) + token_N, minlength=clusters * len(word_V))
    count_KV = count_KV.reshape(clusters, len(word_V))
    share_V = count_KV.sum(0) / len(token_N)
    words = []
    for count_V in count_KV:
        own_V = count_V / max(count_V.sum(), 1)
        score_V = own_V * np.log(np.where(count_V > 0, own_V / share_V, 1))
        best = [v for v in np.argsort(-score_V, kind="stable") if score_V[v] > 0 and word_V[v]]
        words.append([word_V[v] for v in best[:_WORDS]])
    return words


def _tokens(model: Explored, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are of the documents shown, bool [N], and how many of each."""
    count = np.bincount(model.reading.document_N, minlength=shown.max() + 1)
    return np.isin(model.reading.document_N, shown), count[shown]


def _texts(model: Explored, shown: np.ndarray) -> dict[str, Any]:
    """Texts as far as the model read them, how to cut them into tokens, and each token's cluster."""
    inside_N, count = _tokens(model, shown)
    pieces = [model.reading.pieces[n] for n in np.flatnonzero(inside_N)]
    ends = np.cumsum(count).tolist()
    lengths = [len(piece.encode("utf-16-le", "surrogatepass")) // 2 for piece in pieces]  # as a browser counts
    return {
        "texts": ["".join(pieces[a:b]) for a, b in zip([0, *ends], ends, strict=False)],
        "tokens": _pack(count),
        "lengths": _pack(lengths),
        "labels": _pack(model.clusters.label_N[inside_N]),
    }


def _chosen(model: Explored, traced: np.ndarray) -> dict[str, Any]:
    """The experts that the tokens of some documents chose, all layers of a token side by side."""
    inside_N, _ = _tokens(model, traced)
    chosen = [chosen_NC[inside_N] for chosen_NC in model.reading.chosen_LNC]
    return {"choices": [c.shape[1] for c in chosen], "experts": _pack(np.concatenate(chosen, axis=1))}


def _text_bytes(documents: Sequence[Text], models: Iterable[Explored]) -> int:
    return sum(len(_json(_texts(model, np.arange(len(documents))))) for model in models)


def _chosen_bytes(model: Explored, shown: np.ndarray) -> int:
    return len(_json(_chosen(model, shown)))
