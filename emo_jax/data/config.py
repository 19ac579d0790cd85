"""What text a run reads and how it becomes rows."""

import dataclasses
import math
import re
from typing import NamedTuple

from emo_jax.errors import UserError, require, require_choice

SOURCES = ("installed_text", "jsonl", "text", "tfds", "examples", "mixture")
PACKINGS = ("concatenate", "best_fit")


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
    `examples`: JSON lines with `prompt` and `answer`, which alone is learnt; each is a document. `mixture`: several of
    these."""
    path: str = ""
    """File, folder or glob of `source`; for `tfds` a prepared dataset's folder or a name such as
    `wikipedia/20230601.en`; unused by `installed_text`."""
    mixture: tuple[str, ...] = ()
    """Parts of a `mixture`, each `NAME=WEIGHT:SOURCE:PATH` as in `books=0.3:text:texts/books`. Weights are shares of
    the training rows, relative to one another. A row holds documents of one part; each part goes through all of its
    rows, in an order that is new each time, before any comes again. A document without a domain has the part's name."""
    text_field: str = "text"
    """Where `jsonl` objects and `tfds` examples hold their text."""
    tokenizer: str = ""
    """A Hugging Face `tokenizer.json`; empty: a byte-level BPE of `model.vocab_size` entries is trained
    on the run's own training documents."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends a document; must exist in the tokenizer. Empty: documents end without one."""
    sequence_length: int = 1024
    """S: tokens in a row."""
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
    all pieces of one are on the same side of the held-out split."""
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
