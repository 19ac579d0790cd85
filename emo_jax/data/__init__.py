"""Where do tokens come from? A source of documents becomes a token store once, then rows and batches of any shape."""

from emo_jax.data.config import DataConfig
from emo_jax.data.documents import Document, is_heldout
from emo_jax.data.examples import Example, example_batches, examples_by_domain, labelled_batches, read_examples
from emo_jax.data.packing import Rows, is_repetitive, pack_rows, padding_share, row, row_domains
from emo_jax.data.pipeline import count_train_rows, domain_batches, first_documents, heldout_batches, train_batches
from emo_jax.data.sources import has_labels, label_names, read_documents
from emo_jax.data.store import Split, TokenStore, build_store, open_store, prepare_store
from emo_jax.data.tokenizer import encode, load_tokenizer, token_count, train_tokenizer

__all__ = [
    "DataConfig",
    "Document",
    "Example",
    "Rows",
    "Split",
    "TokenStore",
    "build_store",
    "count_train_rows",
    "domain_batches",
    "encode",
    "example_batches",
    "examples_by_domain",
    "first_documents",
    "has_labels",
    "heldout_batches",
    "is_heldout",
    "is_repetitive",
    "label_names",
    "labelled_batches",
    "load_tokenizer",
    "open_store",
    "pack_rows",
    "padding_share",
    "prepare_store",
    "read_documents",
    "read_examples",
    "row",
    "row_domains",
    "token_count",
    "train_batches",
    "train_tokenizer",
]
