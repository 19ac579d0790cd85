"""The public face: `load` a model from a folder, call it, let it write, cut it, save it.

Letters: B rows, S sequence, V vocabulary.
"""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from tokenizers import Tokenizer

from emo_jax.data import Example, encode, example_batches, labelled_batches, load_tokenizer
from emo_jax.errors import UserError, require, require_choice
from emo_jax.inference import Completion, Generator, Sampling, Speed, complete, pool_size
from emo_jax.interop import write_folder
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.model import Kept, ModelConfig, bind
from emo_jax.model.functional import LeafPath, Parameters, leaf_at
from emo_jax.modularity import Subset, cut, emergent, fingerprint, kept_masks, select


class Model:
    """A model and its parameters, ready to call.

    Attributes:
      config: of the model.
      params: nested dict of arrays, such as `params["layers"]["00"]["moe"]["router"]`.
      tokenizer: path of its `tokenizer.json`; None where it came without one.
      end_of_text_id: the token that ends a document; −1 where none is known.
      origin: Hugging Face folder, or what was kept of it, that the weights came from; None for none.
      subset: the experts it is confined to, see `apply_subset`; None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Parameters,
        tokenizer: Path | None = None,
        end_of_text_id: int = -1,
        origin: Path | None = None,
    ):
        self.config = copy.deepcopy(config)
        self.params = jax.tree.map(jnp.asarray, params)  # to the device once, not at every call
        self.tokenizer, self.end_of_text_id, self.origin = tokenizer, end_of_text_id, origin
        self.subset: Subset | None = None
        self._kept: list[Kept] | None = None
        self._forward = jax.jit(functools.partial(_logits, self.config))
        self._generator = Generator(self.config)

    @property
    def end_of_text(self) -> str:
        """The token that ends a document, as text; empty where none is known."""
        if self.tokenizer is None or self.end_of_text_id < 0:
            return ""
        return Tokenizer.from_file(str(self.tokenizer)).id_to_token(self.end_of_text_id) or ""

    @property
    def fingerprint(self) -> str:
        """Tells models apart, see `Subset.model`."""
        return fingerprint(self.config, self.params)

    def apply_subset(
        self, subset: Subset | str | Path | None, *, renormalized: bool = True, ablate: bool = False
    ) -> "Model":
        """This model confined to a subset of its experts, as a mask: free, and None takes it off again.

        Args:
          subset: of this model, or its file.
          renormalized: weights are the softmax over the kept experts; False: the whole router's probabilities.
          ablate: all experts but the subset's instead.

        Raises:
          UserError: where the subset is another model's or keeps too few experts.
        """
        model = copy.copy(self)
        model.subset, model._kept = None, None
        if subset is not None:
            model.subset = _read(subset)
            model.subset.check(self.config, self.fingerprint)
            model._kept = kept_masks(self.config, model.subset, renormalized=renormalized, ablate=ablate)
        return model

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        pool: str = "none",
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Continues one prompt or a batch of them, each until its text ends or `max_new_tokens` are drawn.

        Compiled once a number of prompts and power of two of their length. All prompts advance together. Texts are
        encoded as they are: no token is put before them.

        Args:
          prompts: texts, or token ids.
          max_new_tokens: at most so many a prompt.
          temperature: 0: the most likely token, always.
          top_k, top_p: limits to the most likely tokens, see `inference.Sampling`; 0 and 1: none.
          stop: texts that end a completion, and are not part of it.
          seed: of the draws.
          pool: `none`: every token chooses among all experts, as the models are released; `prompt:32`: among the 32
            routed experts that the prompt asks for most, in each layer; what follows cannot leave them.
          on_text: receives (place among the prompts, piece of text) as the texts grow.

        Returns:
          A `Completion` a prompt.

        Raises:
          UserError: where an argument cannot work, or texts meet a model without a tokenizer.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        return self._complete(prompts, max_new_tokens, sampling, stop, pool, on_text)[0]

    def classify(
        self, texts: Sequence[str | tuple[str, str]], *, sequence_length: int = 512, batch_size: int = 8
    ) -> np.ndarray:
        """What a classifier makes of texts: probabilities of `config.labels`, float32 [texts, labels].

        Args:
          texts: or pairs of texts.
          sequence_length: longer texts are cut to so many tokens.
          batch_size: texts that are read at a time.

        Raises:
          UserError: where the model is no classifier or has no tokenizer, or a text has no token.
        """
        config = self.config
        require(bool(config.labels), "The model is no classifier (model.labels is empty); emo_jax.finetune makes one.")
        if self.tokenizer is None:
            raise UserError("The model has no tokenizer.json to read the texts with; put its own in its folder.")
        pairs = [(text, "") if isinstance(text, str) else text for text in texts]
        batches = labelled_batches(
            [Example(first, second, "text") for first, second in pairs],
            load_tokenizer(self.tokenizer, self.end_of_text, config.vocab_size),
            **config.label_fields,
            sequence_length=min(sequence_length, config.max_positions or sequence_length),
            batch_size=batch_size,
            max_documents=1,
        )
        found = np.full((len(pairs), len(config.labels)), np.nan, np.float32)
        for batch in batches:
            logits_BSV = self._forward(
                self.params, batch["tokens"], batch["document_ids"], self._kept, batch.get("token_types")
            )
            read_BS = batch["loss_mask"]
            found[batch["examples"][read_BS]] = jax.nn.softmax(logits_BSV)[read_BS]
        empty = np.flatnonzero(np.isnan(found[:, 0]))
        require(not len(empty), f"Text {empty[:1]} of those to classify has no token.")
        return found

    def _complete(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        pool: str,
        on_text: Callable[[int, str], None] | None,
    ) -> tuple[list[Completion], Speed]:
        """As `generate`, and how fast."""
        check_generates(self.config)
        tokenizer = None
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer, self.end_of_text, self.config.vocab_size)
        tokens: list[Sequence[int]] = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            if isinstance(prompt, str):
                if tokenizer is None:
                    raise UserError("The model has no tokenizer.json, so prompts must be token ids, as in [[17, 4]].")
                prompt = encode(tokenizer, [prompt])[0]
            tokens.append(prompt)
        self._check_length(max(map(len, tokens), default=0) + max_new_tokens)
        return complete(
            self._generator,
            self.params,
            tokens,
            tokenizer,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=[stop] if isinstance(stop, str) else stop,
            end_of_text_id=self.end_of_text_id,
            pool=pool_size(pool, self.config),
            kept=self._kept,
            on_text=on_text,
        )

    def select(
        self,
        examples: Iterable[str | tuple[str, str]],
        *,
        keep: int,
        method: str = "router_mass",
        sequence_length: int = 1024,
    ) -> Subset:
        """The experts that a task needs, chosen on some of its texts, layer by layer on the already cut model.

        `python -m emo_jax.select` does it for files, and has more criteria and budgets.

        Args:
          examples: texts, or (prompt, answer): then the answer's tokens count alone.
          keep: experts of a layer, the shared ones included.
          method: a criterion of `modularity.select`.
          sequence_length: tokens in a row; longer texts are cut.

        Raises:
          UserError: where `keep` cannot work, there is no example, or the model has no tokenizer.
        """
        pairs = [("", example) if isinstance(example, str) else example for example in examples]
        require(bool(pairs), "There are no examples to choose experts on.")
        if self.tokenizer is None:
            raise UserError("The model has no tokenizer.json to read the examples with; put its own in its folder.")
        batches = example_batches(
            [Example(prompt, answer, "text") for prompt, answer in pairs],
            Tokenizer.from_file(str(self.tokenizer)),
            self.end_of_text_id,
            sequence_length=sequence_length,
            batch_size=8,
        )
        digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
        return select(self.config, self.params, [batches], method=method, keep=keep, data=digest)

    def cut(self, subset: Subset | str | Path) -> "Model":
        """A smaller model that holds the experts of a subset, or of its file, alone.

        Raises:
          UserError: as `apply_subset`.
        """
        config, params = cut(self.config, self.params, _read(subset))
        return Model(config, params, self.tokenizer, self.end_of_text_id, self.origin)

    def split(
        self,
        *,
        experts: int,
        top_k: int,
        layers: Sequence[int],
        method: str = "kmeans",
        gate: str = "average_key",
        seed: int = 0,
    ) -> "Model":
        """This dense model with some layers split into emergent experts (EMoE, arXiv 2310.10908).

        `python -m emo_jax.emoe split` does it for folders, one parameter at a time.

        Args:
          experts: N, equal parts of a layer's hidden neurons.
          top_k: experts that a token uses; N: all, which changes nothing.
          layers: places of the layers.
          method: how neurons are grouped: `kmeans`, `contiguous` or `random`.
          gate: `average_key`, or a learned `cosine`.
          seed: of the grouping, and of a learned gate.

        Raises:
          UserError: where the model is not dense, or an argument cannot work.
        """
        require(
            method != "coactivation",
            "method='coactivation' needs texts: split the model's folder with python -m emo_jax.emoe split.",
        )
        config = emergent.split_config(self.config, layers=layers, experts=experts, top_k=top_k, gate=gate)

        def read(path: LeafPath) -> np.ndarray:
            return np.asarray(leaf_at(self.params, path))

        params = emergent.split(config, self.params, emergent.neuron_orders(config, read, method, seed=seed), seed)
        return Model(config, params, self.tokenizer, self.end_of_text_id, self.origin)

    def merge(self) -> "Model":
        """The dense model that this split one is made of; `python -m emo_jax.emoe merge` for folders.

        Raises:
          UserError: where it is not split, or its experts are copies.
        """
        return Model(*emergent.merge(self.config, self.params), self.tokenizer, self.end_of_text_id, self.origin)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load` reads and a run can start from (`train.init_from`).

        A subset that is applied is not part of it: `cut` makes a model that holds no more.

        Raises:
          UserError: where the folder holds something already.
        """
        from emo_jax.config import Config, DataConfig, PoolConfig
        from emo_jax.training import weights

        run = Config(model=self.config, pool=PoolConfig(kind="none"), data=DataConfig(end_of_text=self.end_of_text))
        weights.save_model(Path(folder), run, self.params, self.tokenizer)

    def to_huggingface(self, folder: str | Path, *, dtype: str = "") -> None:
        """Writes a Hugging Face folder that the public loaders read; a cut model too.

        A subset that is applied is not part of it. `python -m emo_jax.convert --to_hf` does it for a folder, one
        parameter at a time.

        Args:
          folder: must not exist, or be empty.
          dtype: of the tensors: float32, bfloat16 or float16; empty: as the parameters are.

        Raises:
          UserError: where the folder holds something, no published family can hold the model, or float16 its values.
        """
        from emo_jax.training.conversion import DTYPES, cast  # here, because Orbax takes seconds to import

        if dtype:
            require_choice("dtype", dtype, DTYPES)
        dtype = dtype or str(self.params["embedding"].dtype)

        def leaf(path: LeafPath) -> np.ndarray:
            return cast(path, np.asarray(leaf_at(self.params, path)), dtype)

        write_folder(
            Path(folder),
            dataclasses.replace(self.config, dtype=dtype),
            leaf,
            origin=self.origin,
            tokenizer=self.tokenizer,
            end_of_text_id=self.end_of_text_id,
        )

    def _check_length(self, length: int) -> None:
        most = self.config.max_positions
        require(
            length <= most or not most,
            f"A document of {length} tokens is longer than the {most} positions that the model has learnt; shorten it, "
            "or max_new_tokens.",
        )

    def __call__(self, tokens: ArrayLike, document_ids: ArrayLike | None = None) -> jax.Array:
        """Next-token logits [B, S, V], float32 (or wider), without a document pool; compiled once a shape.

        Of a classifier those of its labels, see `Transformer.readout`.

        Args:
          tokens: integers [B, S].
          document_ids: integers [B, S]: contiguous runs of 1, 2, …; 0 is padding, whose logits mean nothing. Each
            document is computed as if it stood alone, its positions from 0. None: each row is one document.

        Raises:
          UserError: shapes that do not fit, a token outside the vocabulary, a document in several pieces.
        """
        tokens_BS = _integers("tokens", tokens)
        low, high = tokens_BS.min(initial=0), tokens_BS.max(initial=0)
        require(
            low >= 0 and high < self.config.vocab_size,
            f"tokens must lie in 0..{self.config.vocab_size - 1} (the vocabulary); found {low if low < 0 else high}.",
        )
        if document_ids is None:
            ids_BS = np.ones_like(tokens_BS)
        else:
            ids_BS = _integers("document_ids", document_ids)
            require(
                ids_BS.shape == tokens_BS.shape,
                f"document_ids has shape {list(ids_BS.shape)}, tokens {list(tokens_BS.shape)}; they must be equal.",
            )
            _check_documents(ids_BS)
        self._check_length(tokens_BS.shape[1] if document_ids is None else _longest(ids_BS))
        return self._forward(self.params, tokens_BS, ids_BS, self._kept)


def load(path: str | Path, subset: Subset | str | Path | None = None, *, dtype: str = "") -> Model:
    """Reads a model from disk, its parameters in the precision they are stored in.

    Args:
      path: a Hugging Face folder (`config.json` with `model_type`, safetensors), or a run directory of
        `emo_jax.train` (its newest checkpoint).
      subset: of this model, or its file: the model is cut to it while it is read, and no other expert is.
      dtype: precision to compute in, `float32` or `bfloat16`; empty: the model's own.

    Raises:
      UserError: the path is neither, or what is there cannot be read; the subset is another model's.
    """
    path = Path(path)
    looked_for = (
        f"a Hugging Face folder ({CONFIG_FILE} with 'model_type') or a run directory of emo_jax ({CONFIG_FILE} with "
        "'model')"
    )
    require(path.is_dir(), f"{path} is not a folder; looked for {looked_for}.")
    require((path / CONFIG_FILE).is_file(), f"{path} has no {CONFIG_FILE}; looked for {looked_for}.")
    values = read_json(path / CONFIG_FILE)
    require(
        "model_type" in values or "model" in values,
        f"{path / CONFIG_FILE} has neither 'model_type' nor 'model'; looked for {looked_for}.",
    )
    from emo_jax.training import weights  # here, because Orbax takes seconds to import

    config, tokenizer = weights.saved_model(path), path / "tokenizer.json"
    kept = None
    if subset is not None:
        subset = _read(subset)
        subset.check(config, weights.saved_fingerprint(path))
        kept, config = subset.experts, config.cut(subset.experts)
    params = weights.saved_parameters(path, kept=kept)
    if dtype:
        config = dataclasses.replace(config, dtype=dtype)
        config.validate()
    end = values.get("eos_token_id")  # of a Hugging Face folder
    if "model" in values and tokenizer.is_file():
        end = Tokenizer.from_file(str(tokenizer)).token_to_id(weights.end_of_text(path))
    return Model(
        config,
        params,
        tokenizer if tokenizer.is_file() else None,
        end if isinstance(end, int) else -1,
        weights.published_folder(path),
    )


def check_generates(config: ModelConfig) -> None:
    """Raises `UserError` where a model cannot continue texts."""
    require(
        config.causal and not config.labels,
        "The model continues no text: it is an encoder or a classifier (model.causal, model.labels).",
    )


def _read(subset: Subset | str | Path) -> Subset:
    return subset if isinstance(subset, Subset) else Subset.load(subset)


def _logits(
    config: ModelConfig,
    params: Parameters,
    tokens_BS: jax.Array,
    ids_BS: jax.Array,
    kept: list[Kept] | None,
    token_types_BS: jax.Array | None = None,
) -> jax.Array:
    model = bind(config, params)
    hidden_BSD, _ = model(tokens_BS, ids_BS, _positions(ids_BS), kept=kept, token_types_BS=token_types_BS)
    return model.logits(hidden_BSD)


def _positions(ids_BS: jax.Array) -> jax.Array:
    """Places of tokens within their runs of equal ids, from 0: int32 [B, S]."""
    place_BS = jnp.broadcast_to(jnp.arange(ids_BS.shape[1], dtype=jnp.int32).reshape(1, -1), ids_BS.shape)
    starts_BS = jnp.diff(ids_BS, axis=1, prepend=-1) != 0
    return place_BS - jax.lax.cummax(jnp.where(starts_BS, place_BS, 0), axis=1)


def _integers(name: str, values: ArrayLike) -> np.ndarray:
    """As int32 [B, S]."""
    array = np.asarray(values)
    require(
        array.ndim == 2 and np.issubdtype(array.dtype, np.integer),
        f"{name} must be integers of shape [rows, sequence]; found {array.dtype} of shape {list(array.shape)}.",
    )
    return array.astype(np.int32)


def _longest(ids_BS: np.ndarray) -> int:
    """Tokens of the longest document."""
    return max((int(np.bincount(ids_S)[1:].max(initial=0)) for ids_S in ids_BS), default=0)


def _check_documents(ids_BS: np.ndarray) -> None:
    require(ids_BS.min(initial=0) >= 0, f"document_ids must not be negative; found {ids_BS.min(initial=0)}.")
    for row, ids_S in enumerate(ids_BS):
        starts_S = ids_S[np.diff(ids_S, prepend=-1) != 0]
        runs = starts_S[starts_S > 0]
        require(
            len(np.unique(runs)) == len(runs),
            f"document_ids: row {row} has a document in several pieces; each must be one contiguous run.",
        )
