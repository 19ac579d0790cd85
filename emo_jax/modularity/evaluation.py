"""All that `emo_jax.evaluate` measures of one model, as tables by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emo_jax.config import Config
from emo_jax.data import DataConfig, TokenStore, domain_batches, examples_by_domain, first_documents, open_store
from emo_jax.errors import UserError, require, require_choice
from emo_jax.evaluation.serving import WHOLE, Served, cache_hits, switching
from emo_jax.inference import pool_size
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.modularity import tables
from emo_jax.modularity.retention import Batches, SubsetLosses, measure_retention
from emo_jax.modularity.selection import METHODS, check_keep, select
from emo_jax.modularity.subset import Subset, kept_masks

if TYPE_CHECKING:
    from emo_jax.api import Model  # which imports this package

TITLES = {
    "losses": "Loss (nats a token, or a label), accuracy and bits per byte by domain, with all experts",
    "kept": "With the experts of the subset alone",
    "ablated": "Without the experts of the subset",
    "retention": "Nats added and accuracy lost when a domain keeps so many experts, chosen for it",
    "matrix": "Nats added to the domains across by the experts chosen for the domain on the left",
    "calibration": "Nats added, by the number of documents that the experts are chosen on (0: all)",
    "pools": "Nats added on the tokens behind the longest prompt, by the routed experts that a text may use",
    "cache": "Share of expert uses that a cache of the least recently used experts of a layer answers",
    "tasks": "Benchmarks",
}
_BATCH = 8


class Texts:
    """Where the test and the calibration documents of a model come from.

    Test documents are a file's, or the run's own held-out ones; calibration documents are a file's, or else those that
    the run trained on, which are never of a test document's file.
    """

    def __init__(
        self, model: "Model", folder: Path, *, data: str = "", calibration: str = "", sequence_length: int = 1024
    ):
        """For a loaded model and its folder.

        Raises:
          UserError: where the model has no tokenizer, or texts of its own are asked for and it has none.
        """
        if model.tokenizer is None:
            raise UserError(f"{folder} has no tokenizer.json; put the one it was trained with there.")
        self._model, self._folder, self._length = model, folder, sequence_length
        self._data, self._calibration = data, calibration

    def test(self, documents: int) -> tuple[dict[str, Batches], dict[str, int]]:
        """Batches of each domain, and the UTF-8 bytes that they predict; of the first so many documents, 0: all."""
        if self._data:
            return self._read(self._data, documents)
        store, config = run_store(self._folder)
        split = first_documents(store.heldout, store.domains, documents)
        sizes = dict.fromkeys(store.domains, 0)
        for document in store.documents(split, answers=True):
            sizes[document.domain] += len(document.text.encode())
        return domain_batches(split, store.domains, config, _BATCH), sizes

    def calibration(self, documents: int) -> dict[str, Batches]:
        """Batches of each domain to choose experts on; of the first so many documents, 0: all."""
        if self._calibration or self._data:
            require(
                bool(self._calibration),
                f"--calibration is empty: --data={self._data} is what is tested on, so name other texts of the same "
                "domains to choose the experts on.",
            )
            return self._read(self._calibration, documents)[0]
        store, config = run_store(self._folder)
        return domain_batches(first_documents(store.train, store.domains, documents), store.domains, config, _BATCH)

    def _read(self, path: str, documents: int) -> tuple[dict[str, Batches], dict[str, int]]:
        assert self._model.tokenizer is not None
        return examples_by_domain(
            path,
            self._model.tokenizer,
            self._model.end_of_text_id,
            documents=documents,
            sequence_length=self._length,
            batch_size=_BATCH,
            labels=self._model.config.labels,
            **self._model.config.label_fields,
        )


def run_store(folder: Path) -> tuple[TokenStore, DataConfig]:
    """The token store of a run, and how the run reads it.

    Raises:
      UserError: where the folder has none.
    """
    of_a_run = "model_type" not in read_json(folder / CONFIG_FILE)
    config = Config.from_json((folder / CONFIG_FILE).read_text()).data if of_a_run else DataConfig()
    directory = Path(config.cache_dir or folder / "data")
    if not (directory / "manifest.json").is_file():
        raise UserError(f"{folder} has no held-out texts of its own; name some with --data=FILE.")
    return open_store(directory), config


def evaluate_model(
    model: "Model",
    texts: Texts,
    *,
    keeps: Sequence[int] = (),
    matrix_keep: int = 0,
    methods: Sequence[str] = ("router_mass",),
    documents: int = 0,
    calibration_documents: Sequence[int] = (25,),
    subset: Subset | None = None,
    ablate: bool = False,
    renormalized: bool = True,
    pools: Sequence[int] = (),
    prompts: Sequence[int] = (),
    log: Callable[[str], None] = print,
) -> dict[str, tables.Table]:
    """Tables by the names of `TITLES`.

    Args:
      model: with all its experts.
      texts: to test and to choose on.
      keeps: sizes, shared experts included; none: no retention.
      matrix_keep: the one that the cross-domain matrix and the comparison of numbers of documents are made for; 0: the
        last.
      methods: criteria of `select`.
      documents: test documents of each domain; 0: all.
      calibration_documents: the same to choose on; the first number is used for the retention, several are compared.
      subset: one to evaluate.
      ablate: without its experts instead of with them alone.
      renormalized: weights of kept experts.
      pools: sizes of the pools that a prompt chooses, in routed experts; none: neither pools nor caches.
      prompts: their lengths, in tokens.
      log: receives a line a domain.

    Raises:
      UserError: where a size, a method or the subset cannot work, or there are no texts.
    """
    if keeps and not model.config.routed_experts:
        log("This model is dense: it has no experts to keep.")
        keeps = ()
    for keep in keeps:
        check_keep(model.config, keep)
    for method in methods:
        require_choice("method", method, METHODS)
    size = matrix_keep or (keeps[-1] if keeps else 0)
    require(not keeps or size in keeps, f"matrix_keep={size} is not one of keep={list(keeps)}.")
    if subset is not None:
        subset.check(model.config, model.fingerprint)
    if pools and not model.config.routed_experts:
        pools = ()
    for number in pools:
        pool_size(f"prompt:{number}", model.config)
        check_keep(model.config, number + model.config.shared_experts)
    require(not pools or bool(prompts), "pools are chosen by prompts; give their lengths too.")
    first, *others = calibration_documents
    calibration = texts.calibration(first) if keeps or pools else {}
    test, sizes = texts.test(documents)
    losses = SubsetLosses(model.config, model.params, test)
    full = losses.full()
    made = {"losses": tables.loss_table(full, None if model.config.labels else sizes)}
    if subset is not None:
        changed = {d: losses.under(subset, d, renormalized=renormalized, ablate=ablate) for d in full}
        made["ablated" if ablate else "kept"] = tables.change_table(full, changed)
    if keeps:
        result = measure_retention(
            model.config,
            model.params,
            calibration,
            losses,
            keeps=keeps,
            matrix_keep=size,
            methods=methods,
            log=log,
        )
        made["retention"] = tables.retention_table(result)
        made["matrix"] = tables.matrix_table(result)
        if others:
            compared = {first: result}
            for number in others:
                log(f"Choosing on {number or 'all'} documents of each domain ...")
                compared[number] = measure_retention(
                    model.config,
                    model.params,
                    texts.calibration(number),
                    losses,
                    keeps=[size],
                    matrix_keep=size,
                    methods=methods[:1],
                )
            made["calibration"] = tables.calibration_table(compared, size, methods[0])
    if pools:
        log("Serving with pools ...")
        made |= _serve(model, test, calibration, pools, prompts)
    return made


def _serve(
    model: "Model",
    test: dict[str, Batches],
    calibration: dict[str, Batches],
    pools: Sequence[int],
    prompts: Sequence[int],
) -> dict[str, tables.Table]:
    """The tables `pools` and `cache`."""
    config = model.config
    served = Served(config, model.params, test, max(prompts))
    full = {domain: served.loss(domain).loss for domain in test}
    added: dict[tuple[str, str], dict[str, float]] = {}
    hits = {"all experts": cache_hits(switching({d: [*served.choices(d)] for d in test}), max(config.routed_experts))}
    for size in pools:
        for prompt in (*prompts, WHOLE):
            chooser = f"{prompt} tokens" if prompt != WHOLE else "whole text (oracle)"
            losses = {domain: served.loss(domain, size, prompt).loss for domain in test}
            added[str(size), chooser] = {domain: losses[domain] - full[domain] for domain in test}
        keep = size + config.shared_experts
        subsets = {domain: select(config, model.params, [calibration[domain]], keep=keep) for domain in test}
        losses = {d: served.loss(d, kept=kept_masks(config, subset)).loss for d, subset in subsets.items()}
        added[str(size), "other texts (subset)"] = {domain: losses[domain] - full[domain] for domain in test}
        chosen = {domain: [*served.choices(domain, size, max(prompts))] for domain in test}
        hits[f"pool of {size}"] = cache_hits(switching(chosen), max(config.routed_experts))
    sizes = [n for n in (2**power for power in range(1, 12)) if config.fewest_experts <= n < max(config.routed_experts)]
    return {"pools": tables.pools_table(added), "cache": tables.cache_table(hits, [*sizes, max(config.routed_experts)])}
