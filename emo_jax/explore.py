"""What do a model's experts mean? `python -m emo_jax.explore --models=RUN_A,RUN_B --out=DIR [--data=docs.jsonl.gz]`.

Reads the first tokens of some labelled documents, clusters them by how they are routed, and measures what experts know
about domains beyond the words: prints a table, and writes analysis.json, `figures/*.png` and `*.svg`, and explore.html,
a page that opens offline. The documents are those that the first run held out, or JSON lines with `text` and, for all
that compares domains, `domain`; or a folder of .txt and .md files, whose subfolders are domains. A model is a run
directory or a Hugging Face folder.
"""

from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import require

_MODELS = flags.DEFINE_list("models", None, "Run directories or Hugging Face folders.", required=True)
_DATA = flags.DEFINE_string("data", "", "Documents: a file, folder or glob; empty: the first run's held-out ones.")
_OUT = flags.DEFINE_string("out", None, "Folder for numbers, figures and page.", required=True)
_CLUSTERS = flags.DEFINE_integer("clusters", 32, "Clusters of tokens.")
_TOKENS = flags.DEFINE_integer("tokens", 100, "Tokens of a document to read.")
_DOCUMENTS = flags.DEFINE_integer("documents", 1000, "Most documents, taken evenly over domains; 0: all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the choice of documents and the clusters.")
_PROSE = flags.DEFINE_list("prose", [], "Domains to measure again by themselves, such as those of English prose.")
_SATURATION = flags.DEFINE_bool("saturation", False, "Compare earlier checkpoints that the runs have kept, too.")


def main() -> int:
    """Measures, prints and writes."""
    for name, value in (("models", _MODELS.value), ("out", _OUT.value)):
        require(bool(value) and all(value), f"--{name} is empty or holds an empty name.")
    for name, number, least in (
        ("clusters", _CLUSTERS.value, 2),
        ("tokens", _TOKENS.value, 1),
        ("documents", _DOCUMENTS.value, 0),
    ):
        require(number >= least, f"--{name}={number} must be at least {least}.")
    from emo_jax.analysis import explore

    explore(
        _MODELS.value,
        _DATA.value,
        Path(_OUT.value),
        clusters=_CLUSTERS.value,
        tokens=_TOKENS.value,
        documents=_DOCUMENTS.value,
        seed=_SEED.value,
        prose=_PROSE.value,
        with_saturation=_SATURATION.value,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
