"""What text a run reads and how it becomes rows."""

import dataclasses
import math
import re
from typing import NamedTuple

from emo_jax.errors import UserError, require, require_choice

SOURCES = ("installed_text", "jsonl", "text", "tfds", "examples", "tokens", "mixture")
PACKINGS = ("concatenate", "best_fit")
LABEL_PLACES = ("first", "last")
PREPARED_SOURCES = ("jsonl", "text", "tfds", "olmo")
FORMATS = ("array_record", "olmo")
ON_CORRUPT = ("stop", "skip")
TOKEN_TYPES = ("uint16", "uint32")


class Part(NamedTuple):
    """A part of a mixture: its name, its share of the rows (relative to the others') and what it reads."""

    name: str
    weight: float
    source: str
    path: str


@dataclasses.dataclass
class DataConfig:
    """Where documents come from and how they are packed. Sizes are for the whole job, not a process."""

    source: str = "installed_text"
    """`installed_text`: text any Python machine holds. `jsonl`: objects with `text` and an optional
    `domain`, plain, `.gz` or `.zst`. `text`: a folder of `.txt`/`.md` files, its subfolders the domains.
    `tfds`: the training split of a TensorFlow Datasets dataset in ArrayRecord format; TensorFlow is not needed.
    `examples`: JSON lines with `prompt` and `answer`, which alone is learnt, or, with `labels`, with `text` (maybe
    `text_pair` too) and `label`; each is a document. `tokens`: a folder that `python -m emo_jax.prepare` made, read
    where it lies; what it holds was decided there, so of the fields below only those that shape rows and batches act.
    `mixture`: several of these, `tokens` only with its like."""
    path: str = ""
    """File, folder or glob of `source`; for `tfds` a prepared dataset's folder or a name such as
    `wikipedia/20230601.en`; unused by `installed_text`."""
    mixture: tuple[str, ...] = ()
    """Parts of a `mixture`, each `NAME=WEIGHT:SOURCE:PATH` as in `books=0.3:text:texts/books`. Weights are shares of
    the training rows, relative to one another. A row holds documents of one part; each part goes through all of its
    rows, in an order that is new each time, before any comes again. A document without a domain has the part's name."""
    text_field: str = "text"
    """Where `jsonl` objects and `tfds` examples hold their text."""
    labels: tuple[str, ...] = ()
    """Of a classifier of texts, in the order of their indices; each text of source `examples` has one in `label`, as a
    string, a whole number or a bool (`"true"`, `"false"` here). A text has one loss: of its label, at one token. Empty:
    language modelling. `data.label_names` lists those of a file."""
    label_at: str = "last"
    """The token of a text where its label is read. `last`: of a decoder, which has read all of the text there.
    `first`: of an encoder, BERT's [CLS]."""
    special_tokens: bool = False
    """Texts with labels get the tokens that the tokenizer's template puts around a text and between the two of a pair,
    such as BERT's [CLS] and [SEP], and their token types. False: a text and its pair, one behind another."""
    tokenizer: str = ""
    """A Hugging Face `tokenizer.json`; empty: a byte-level BPE of `model.vocab_size` entries is trained
    on the run's own training documents."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends a document; must exist in the tokenizer. Empty: documents end without one."""
    sequence_length: int = 1024
    """S: tokens in a row. A text with a label is cut to it, the longer one of a pair first."""
    batch_size: int = 8
    """B: rows in a step."""
    max_documents: int = 64
    """G: most documents in a row; the packer starts a new row rather than exceed it."""
    packing: str = "concatenate"
    """`concatenate`: rows are consecutive windows of the token stream, without padding, and cut documents
    at their ends. `best_fit`: a document of up to S tokens stays whole, a longer one is cut every S tokens,
    and rows end in some padding. Held-out rows are packed alike."""
    max_repetitions: int = 0
    """A training row where 1 to 13 tokens repeat at least this many times on end trains nothing: it reaches
    neither router nor loss. 32 is the released recipe's; 0: no filter."""
    heldout_fraction: float = 0.05
    """Share of documents kept for evaluation, chosen by a hash of their text, so that copies of a
    document never end up on both sides."""
    heldout_documents: int = 40
    """Most held-out documents of a domain that an evaluation reads."""
    max_document_bytes: int = 12_000
    """Longer documents are cut into pieces of at most this many UTF-8 bytes, which then count as documents;
    all pieces of one are on the same side of the held-out split. Texts with labels stay whole."""
    max_megabytes: int = 0
    """Stop after this much text (10⁶ bytes), spread evenly over the domains; 0: read everything."""
    cache_dir: str = ""
    """Local folder where tokens are kept; empty: `data/` in the run directory."""
    shuffle_seed: int = 0
    """Seed of the order of documents and rows."""

    def parts(self) -> list[Part]:
        """What is read; one part, without a name, unless the source is a mixture.

        Raises:
          UserError: where a part of the mixture is not `NAME=WEIGHT:SOURCE:PATH`.
        """
        if self.source != "mixture":
            return [Part("", 1.0, self.source, self.path)]
        return [_part(text) for text in self.mixture]

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        require_choice("data.source", self.source, SOURCES)
        require(
            self.source in ("installed_text", "mixture") or bool(self.path),
            f"data.source={self.source!r} needs data.path: what to read.",
        )
        require(
            (self.source == "mixture") == bool(self.mixture),
            f"data.source={self.source!r} with data.mixture={self.mixture!r}: parts are for source='mixture', "
            "which needs some.",
        )
        require(
            self.source != "mixture" or not self.path,
            f"data.path={self.path!r} is not read by a mixture; its parts have paths of their own.",
        )
        names = [part.name for part in self.parts()]
        require(len(set(names)) == len(names), f"data.mixture names a part twice: {', '.join(names)}.")
        prepared = [part.source == "tokens" for part in self.parts()]
        require(
            all(prepared) or not any(prepared),
            "data.mixture has parts of source 'tokens' beside others: prepare the others too (python -m "
            "emo_jax.prepare, with the same tokenizer), or give the first as text.",
        )
        require_choice("data.packing", self.packing, PACKINGS)
        require(
            self.max_repetitions == 0 or self.max_repetitions >= 2,
            f"data.max_repetitions={self.max_repetitions} must be at least 2, or 0 for no filter.",
        )
        for name in ("sequence_length", "batch_size", "max_documents", "heldout_documents", "max_document_bytes"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}={value} must be at least 1.")
        require(
            self.max_document_bytes >= 4,
            f"data.max_document_bytes={self.max_document_bytes} cannot hold every character; give at least 4.",
        )
        require(self.sequence_length >= 2, f"data.sequence_length={self.sequence_length} leaves nothing to predict.")
        require(
            0 < self.heldout_fraction < 1,
            f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 1, both excluded.",
        )
        require(self.max_megabytes >= 0, f"data.max_megabytes={self.max_megabytes} is negative; 0 reads everything.")
        require(bool(self.text_field), "data.text_field is empty; name the field that holds the text.")
        self._validate_labels()

    def _validate_labels(self) -> None:
        require_choice("data.label_at", self.label_at, LABEL_PLACES)
        if not self.labels:
            require(
                not self.special_tokens,
                "data.special_tokens=True is for texts with labels; name them in data.labels, or leave it out.",
            )
            return
        require(
            len(self.labels) > 1 and len(set(self.labels)) == len(self.labels) and all(self.labels),
            f"data.labels={self.labels!r} must be at least two different names, or empty for a language model.",
        )
        require(
            self.source == "examples",
            f"data.source={self.source!r} has no labels, but data.labels={self.labels!r}: only data.source='examples' "
            "goes with them, one file, folder or glob of JSON lines with text and label.",
        )
        require(
            self.packing == "best_fit",
            f"data.packing={self.packing!r} cuts texts where rows end, and a label is of a whole text: with "
            "data.labels set data.packing='best_fit'.",
        )


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """A corpus that becomes tokens on disk once: the flags of `python -m emo_jax.prepare`."""

    source: str = "jsonl"
    """`jsonl`, `text` or `tfds`, as in `DataConfig.source`. `olmo`: arrays of tokens that others made; `path` is their
    mix file with lines `label,path`. They are indexed where they lie."""
    path: str = ""
    """File, folder or glob; a dataset's folder or name; a mix file."""
    out: str = ""
    """Folder for the result."""
    text_field: str = "text"
    """Where `jsonl` objects and `tfds` examples hold their text."""
    format: str = "array_record"
    """Of the result. `array_record`: files of records, a document each, compressed. `olmo`: arrays of 32-bit tokens
    without a header, one document behind another, and `mix.txt`, which lists them."""
    tokenizer: str = ""
    """A Hugging Face `tokenizer.json`; empty: a byte-level BPE is trained on a sample of the corpus."""
    vocab_size: int = 50_304
    """Entries of a tokenizer that is trained."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends every document."""
    heldout_fraction: float = 0.001
    """Share of documents kept from training, chosen by a hash of their text, so that copies are on one side."""
    heldout_documents: int = 40
    """Of those, how many of a domain an evaluation reads: the ones with the smallest hashes."""
    heldout_bytes: int = 12_000
    """Of each of them at most so many first bytes."""
    dedup: bool = True
    """Whether only the first of several documents with the same text is kept."""
    min_characters: int = 0
    """Shorter documents are dropped."""
    max_characters: int = 0
    """Longer documents are dropped; 0: none are."""
    max_duplicate_lines: float = 1.0
    """Documents are dropped where more than this share of their characters is in lines that occurred before in the
    same document: a filter of the Gopher corpus, at 0.2 there (Rae et al. 2021, arXiv 2112.11446, table A1)."""
    on_corrupt: str = "stop"
    """At a line or file that cannot be read, `stop` or `skip` it: a line singly, a broken file as a whole; both are
    listed in the manifest."""
    unit_megabytes: float = 64.0
    """Input that is done at a time, in 10⁶ bytes; a compressed file is always done in one go."""
    token_type: str = "uint32"
    """Of the arrays that source `olmo` reads: `uint32`, or `uint16` as older ones have it."""

    def validate(self) -> None:
        """Raises `UserError` naming the first flag that cannot work."""
        require_choice("--source", self.source, PREPARED_SOURCES)
        require_choice("--format", self.format, FORMATS)
        require_choice("--on_corrupt", self.on_corrupt, ON_CORRUPT)
        require_choice("--token_type", self.token_type, TOKEN_TYPES)
        require(bool(self.path), "--path is empty; give what to read: a file, a folder, or a glob in quotes.")
        require(bool(self.out), "--out is empty; give a folder for the result.")
        require(bool(self.text_field), "--text_field is empty; name the field that holds the text.")
        require(bool(self.end_of_text), "--end_of_text is empty; name the token that ends a document.")
        require(
            0 < self.heldout_fraction < 1,
            f"--heldout_fraction={self.heldout_fraction} must lie between 0 and 1, both excluded.",
        )
        require(self.heldout_documents >= 1, f"--heldout_documents={self.heldout_documents} must be at least 1.")
        require(
            self.heldout_bytes >= 4,
            f"--heldout_bytes={self.heldout_bytes} cannot hold every character; give at least 4.",
        )
        require(self.min_characters >= 0, f"--min_characters={self.min_characters} is negative; 0 keeps any length.")
        require(
            self.max_characters == 0 or self.max_characters >= max(self.min_characters, 1),
            f"--max_characters={self.max_characters} must be at least --min_characters={self.min_characters}, or 0 "
            "for no limit.",
        )
        require(
            0 <= self.max_duplicate_lines <= 1,
            f"--max_duplicate_lines={self.max_duplicate_lines} is a share of a document and lies in 0..1; 1 keeps all.",
        )
        require(
            0 < self.unit_megabytes <= 10_000,
            f"--unit_megabytes={self.unit_megabytes} must be positive and at most 10000.",
        )
        for name in _unused_flags(self.source):
            value, default = getattr(self, name), getattr(PrepareConfig(), name)
            require(value == default, f"--{name}={value} does nothing with --source={self.source}; leave it out.")
        require(
            self.source != "olmo" or bool(self.tokenizer),
            "--source=olmo needs --tokenizer: the tokenizer.json that made the arrays, whose --end_of_text ends their "
            "documents.",
        )


def _unused_flags(source: str) -> tuple[str, ...]:
    if source != "olmo":
        return ("token_type", "text_field") if source == "text" else ("token_type",)
    filters = ("dedup", "min_characters", "max_characters", "max_duplicate_lines", "on_corrupt")
    return ("text_field", "format", "unit_megabytes", *filters)


def _part(text: str) -> Part:
    match = re.fullmatch(r"([^=:]+)=([^:]*):([^:]*)(?::(.*))?", text)
    if match is None:
        raise UserError(f"data.mixture has {text!r}; a part is NAME=WEIGHT:SOURCE:PATH, as in books=0.3:text:DIR.")
    name, weight, source, path = match[1], match[2], match[3], match[4] or ""
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    require(0 < value < math.inf, f"data.mixture has {text!r}, whose weight {weight!r} is not a positive number.")
    require_choice(f"source of data.mixture's {name!r}", source, tuple(s for s in SOURCES if s != "mixture"))
    require(source == "installed_text" or bool(path), f"data.mixture has {text!r}, which needs a path to read.")
    return Part(name, value, source, path)
