"""What a model's routers do with the first tokens of some documents, each read as if it stood alone and without pools.

Letters: N tokens of all documents, M documents, B rows, S tokens of a row, R routed experts, C choices, L mixture
layers.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding, Tokenizer

from emo_jax.data import Document, load_tokenizer
from emo_jax.data.documents import digest_bytes
from emo_jax.data.sources import DEFAULT_DOMAIN, JSONL, TEXT, example_documents, text_documents
from emo_jax.errors import UserError, require
from emo_jax.model import ModelConfig, bind

if TYPE_CHECKING:
    from emo_jax.api import Model

_ROWS = 16
"""Of a batch: enough to fill two cores, and 16 layers of 127 experts still leave only megabytes."""
_CHARACTERS = 16
"""Of a long document so many for each token are tokenized, so that a book costs no more than a letter."""


class Text(NamedTuple):
    """A document, shared by all models; its domain is empty where it has no label."""

    text: str
    domain: str


class Reading(NamedTuple):
    """What a model's routers did with the first tokens of some documents.

    Attributes:
      name: of the model, unique among those compared.
      pieces: [N] the text of each token; those of a document joined are its text, as far as it was read. A token that
        ends inside a character has "", and the one that completes it has the character.
      token_N: int32 token ids.
      document_N: int32, ascending: whose text it is. A document without a token does not occur.
      probability_LNR: float16 [N, R] of each mixture layer, the softmax over its routed experts.
      chosen_LNC: int16 [N, C] of each, as the model chose: always active experts first, then by falling probability.
    """

    name: str
    pieces: list[str]
    token_N: np.ndarray
    document_N: np.ndarray
    probability_LNR: list[np.ndarray]
    chosen_LNC: list[np.ndarray]

    def select(self, keep_N: np.ndarray) -> "Reading":
        """The tokens where the mask `keep_N` is true; documents keep their numbers."""
        return Reading(
            self.name,
            [piece for piece, keep in zip(self.pieces, keep_N, strict=True) if keep],
            self.token_N[keep_N],
            self.document_N[keep_N],
            [probability_NR[keep_N] for probability_NR in self.probability_LNR],
            [chosen_NC[keep_N] for chosen_NC in self.chosen_LNC],
        )


def read_texts(path: str) -> Iterator[Document]:
    """JSON lines with a `text` (or `prompt` and `answer`) and an optional `domain`, or .txt and .md files.

    Args:
      path: a file, a folder or a glob. A folder without JSON lines is read as texts, whose subfolders are domains.

    Raises:
      UserError: where there is nothing, or a file cannot be read; while iterating.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        lines = any(file.name.endswith(JSONL) for file in root.rglob("*"))
    else:
        lines = not root.name.endswith(TEXT)
    return example_documents(path) if lines else text_documents(path)


def choose_documents(documents: Iterable[Document], limit: int, seed: int) -> list[Text]:
    """At most `limit` documents (0: all), as many of each domain as can be, sorted by domain.

    Which of a domain's depends on their texts and the seed alone, and no more than a few times `limit` are held.

    Raises:
      UserError: where there is none.
    """
    by_domain: dict[str, list[tuple[bytes, str]]] = {}
    for document in documents:
        domain = "" if document.domain == DEFAULT_DOMAIN else document.domain
        own = by_domain.setdefault(domain, [])
        own.append((digest_bytes(f"{seed} {document.text}".encode()), document.text))
        if limit and len(own) >= 2 * limit:
            own[:] = sorted(own)[:limit]
    require(bool(by_domain), "There are no documents to read.")
    ranked = [(rank, key, text) for key, own in by_domain.items() for rank, (_, text) in enumerate(sorted(own))]
    chosen = sorted(ranked, key=lambda item: item[:2])[: limit or None]
    return [Text(text, domain) for _, domain, text in sorted(chosen, key=lambda item: (item[1], item[0]))]


def read_routers(model: "Model", documents: Sequence[Text], tokens: int, name: str = "") -> Reading:
    """Routes the first `tokens` tokens of each document through the whole model; compiled once.

    Raises:
      UserError: where there is no document with a token, or the model is dense, has no tokenizer, or is confined to a
        subset by a mask.
    """
    require(tokens >= 1, f"tokens={tokens} must be at least 1.")
    require(bool(model.config.routed_experts), f"The model {name} is dense: it has no routers to look at.")
    require(model.subset is None, f"The model {name} is masked; look at model.cut(subset), which holds no others.")
    if model.tokenizer is None:
        raise UserError(f"The model {name} has no tokenizer.json; put the one it was trained with into its folder.")
    tokenizer = load_tokenizer(model.tokenizer, model.end_of_text, model.config.vocab_size)
    read = [(n, *first_tokens(tokenizer, document.text, tokens)) for n, document in enumerate(documents)]
    read = [(n, ids, pieces) for n, ids, pieces in read if ids]
    require(bool(read), f"None of the {len(documents)} documents has a token to read.")

    total, choices = sum(len(ids) for _, ids, _ in read), model.config.num_choices
    probability_LNR = [np.empty((total, experts), np.float16) for experts in model.config.routed_experts]
    chosen_LNC = [np.empty((total, choices), np.int16) for _ in probability_LNR]
    decide, start = jax.jit(functools.partial(_decide, model.config)), 0
    for first in range(0, len(read), _ROWS):
        rows = [ids for _, ids, _ in read[first : first + _ROWS]]
        tokens_BS, inside_BS = np.zeros((_ROWS, tokens), np.int32), np.zeros((_ROWS, tokens), bool)
        for b, ids in enumerate(rows):
            tokens_BS[b, : len(ids)], inside_BS[b, : len(ids)] = ids, True
        part = slice(start, start := start + sum(map(len, rows)))
        for layer, (probability_BSR, chosen_BSC) in enumerate(decide(model.params, tokens_BS, inside_BS)):
            probability_LNR[layer][part] = np.asarray(probability_BSR)[inside_BS]
            chosen_LNC[layer][part] = np.asarray(chosen_BSC)[inside_BS]
    return Reading(
        name,
        [piece for *_, pieces in read for piece in pieces],
        np.concatenate([np.array(ids, np.int32) for _, ids, _ in read]),
        np.repeat(np.array([n for n, *_ in read], np.int32), [len(ids) for _, ids, _ in read]),
        probability_LNR,
        chosen_LNC,
    )


class Labels(NamedTuple):
    """Whose the tokens of a reading are.

    Attributes:
      names: of the domains, sorted.
      domain_M: int, place in `names` of each document that has tokens.
      document_N: int, place in `domain_M` of each token's document.
    """

    names: list[str]
    domain_M: np.ndarray
    document_N: np.ndarray

    @property
    def domain_N(self) -> np.ndarray:
        """Place in `names` of each token's domain."""
        return self.domain_M[self.document_N]


def label(reading: Reading, documents: Sequence[Text]) -> Labels:
    """The domains of the documents that occur in a reading."""
    found_M, document_N = np.unique(reading.document_N, return_inverse=True)
    names, domain_M = np.unique([documents[document].domain for document in found_M], return_inverse=True)
    return Labels(names.tolist(), domain_M, document_N)


def document_means(reading: Reading) -> list[np.ndarray]:
    """Mean probabilities over each document's tokens, float32 [M, R] of each layer, in the order of `Labels`."""
    _, starts_M, counts_M = np.unique(reading.document_N, return_index=True, return_counts=True)
    return [
        np.add.reduceat(probability_NR, starts_M, axis=0, dtype=np.float32) / counts_M[:, None].astype(np.float32)
        for probability_NR in reading.probability_LNR
    ]


def first_tokens(tokenizer: Tokenizer, text: str, tokens: int) -> tuple[list[int], list[str]]:
    """Ids and pieces, as in `Reading`, of at most so many tokens that a text begins with."""
    head = text[: _CHARACTERS * tokens]
    encoding = tokenizer.encode(head, add_special_tokens=False)
    if len(encoding.ids) < 2 * tokens and len(head) < len(text):  # near the cut, tokens may be others
        head, encoding = text, tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids[:tokens], _pieces(encoding, head, tokens)


def _pieces(encoding: Encoding, text: str, tokens: int) -> list[str]:
    """A text cut behind each of its first tokens, before any character that a later token has a part of."""
    ends, later = [], len(text)
    for start, end in reversed(encoding.offsets[: tokens + 4]):  # a character has four bytes at most
        ends.append(min(end, later))
        later = min(later, start) if end > start else later
    pieces, done = [], 0
    for end in ends[::-1][:tokens]:
        pieces.append(text[done : max(done, end)])
        done = max(done, end)
    if pieces and len(encoding.ids) <= tokens:
        pieces[-1] += text[done:]  # what a tokenizer drops, such as spaces at the end
    return pieces


def _decide(
    config: ModelConfig, params: Any, tokens_BS: jax.Array, inside_BS: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """Of each mixture layer, the router's probabilities [B, S, R] and the experts chosen [B, S, C]."""
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]).reshape(1, -1), tokens_BS.shape)
    _, routings = bind(config, params)(tokens_BS, inside_BS.astype(jnp.int32), positions_BS)
    return [
        (jax.nn.softmax(routing.logits_BSR).astype(jnp.float16), routing.indices_BSC.astype(jnp.int16))
        for routing in routings
    ]
