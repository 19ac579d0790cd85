"""Tokens after tokens: one jitted prefill of the prompts, then one jitted step a token.

Prompts are padded on their left to a bucket's length, so that all rows write the same slot of the cache. A padding
token has document id 0: it reaches no expert, and no token attends to it.

Letters: B rows, S prompt slots, V vocabulary, M cache slots, R routed experts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.errors import require
from emo_jax.model import Kept, ModelConfig, PoolConfig, PoolDraws, Transformer, bind
from emo_jax.model.attention import KeyValues, Past
from emo_jax.model.functional import Parameters

SHORTEST = 32
"""Prompts are padded to it or to a larger power of two: few shapes, each of which is compiled."""
CACHE_STEP = 128
"""The cache has a multiple of so many slots."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.0
    """Divides the logits; 0: the most likely token, always."""
    top_k: int = 0
    """Only the so many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    seed: int = 0
    """Of the draws: a row's depend on its place among the rows, not on what the other rows are."""

    def __post_init__(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative; 0 is greedy.")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative; 0 considers every token.")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 considers every token.")


class Cache(NamedTuple):
    """What the model keeps of the tokens it has read; every row's next token goes to the same slot.

    Attributes:
      seen: keys and values of each layer.
      start_B: int32, the slot of each row's first token.
      slot: int32 scalar, where the next token goes.
    """

    seen: list[KeyValues]
    start_B: jax.Array
    slot: jax.Array


class _Limits(NamedTuple):
    """The numbers of a `Sampling`, and how many ids of the vocabulary are tokens: scalars on the device."""

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    tokens: jax.Array


def pool_size(text: str, config: ModelConfig) -> int:
    """The n of `prompt:n`, experts in the document pool that a prompt chooses; 0 for `none`.

    Raises:
      UserError: where the text is neither, the model is dense, or n is not possible.
    """
    if text == "none":
        return 0
    kind, _, number = text.partition(":")
    require(
        kind == "prompt" and number.isdecimal(),
        f"pool={text!r} must be none, or prompt:N with the number of routed experts in the pool, as in prompt:32.",
    )
    require(bool(config.routed_experts), f"pool={text!r} needs experts, but this model is dense; set pool=none.")
    size = int(number)
    require(
        config.fewest_experts <= size,
        f"pool={text!r} must have at least the {config.fewest_experts} routed experts that a token chooses.",
    )
    return size


def fixed_pools(size: int, rows: int, layers: int, documents: int = 1) -> PoolDraws:
    """The draws of pools that all have the same size."""
    shape = (rows, layers, documents)
    return PoolDraws(jnp.full(shape, size, jnp.int32), jnp.zeros((*shape, 2), jnp.uint32))


class Generator:
    """Prefill and decode of one model; compiled once a number of rows, bucket of prompts and size of the cache."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._prefill = jax.jit(
            functools.partial(_prefill, config), static_argnames=("slots", "pool", "sampled", "limited")
        )
        self._decode = jax.jit(
            functools.partial(_decode, config), static_argnames=("sampled", "limited"), donate_argnums=1
        )

    def __call__(
        self,
        params: Parameters,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        pool: int = 0,
        kept: list[Kept] | None = None,
        vocabulary: int = 0,
    ) -> Iterator[jax.Array]:
        """Yields the next token of every row, int32 [B] on the device, `max_new_tokens` times.

        Nothing is waited for: read a token after asking for the one behind it, and the device never idles.

        Args:
          params: of the model.
          prompts: token ids; at least one a row.
          max_new_tokens: how many.
          sampling: None: greedy.
          pool: routed experts in the pool that each prompt chooses for itself and what follows; 0: no pool.
          kept: a subset of the experts, see `Transformer`.
          vocabulary: ids from here on are never drawn; 0: all may be.

        Raises:
          UserError: an empty prompt, or a token outside the vocabulary.
        """
        sampling = sampling or Sampling()
        tokens_BS, ids_BS = self._padded(prompts)
        slots = -(-(tokens_BS.shape[1] + max_new_tokens) // CACHE_STEP) * CACHE_STEP
        limits = _Limits(
            jax.random.key(sampling.seed, impl="threefry2x32"),
            jnp.float32(sampling.temperature),
            jnp.int32(sampling.top_k or self._config.vocab_size),
            jnp.float32(sampling.top_p),
            jnp.int32(vocabulary or self._config.vocab_size),
        )
        how = {
            "sampled": sampling.temperature > 0,
            "limited": sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1),
        }
        token_B, cache, kept = self._prefill(params, tokens_BS, ids_BS, limits, kept, slots=slots, pool=pool, **how)
        yield token_B
        for _ in range(max_new_tokens - 1):
            token_B, cache = self._decode(params, cache, token_B, limits, kept, **how)
            yield token_B

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts at the right ends of the rows of a bucket, and their document ids: int32 [B, S] each."""
        require(all(len(prompt) for prompt in prompts), "A prompt is empty; give at least one token, such as a space.")
        length = SHORTEST
        while length < max(map(len, prompts)):
            length *= 2
        tokens_BS = np.zeros((len(prompts), length), np.int32)
        ids_BS = np.zeros((len(prompts), length), np.int32)
        for row, prompt in enumerate(prompts):
            bad = [token for token in prompt if not 0 <= token < self._config.vocab_size]
            require(not bad, f"Tokens must lie in 0..{self._config.vocab_size - 1} (the vocabulary); found {bad[:1]}.")
            tokens_BS[row, length - len(prompt) :] = prompt
            ids_BS[row, length - len(prompt) :] = 1
        return tokens_BS, ids_BS


def _prefill(
    config: ModelConfig,
    params: Parameters,
    tokens_BS: jax.Array,
    ids_BS: jax.Array,
    limits: _Limits,
    kept: list[Kept] | None,
    *,
    slots: int,
    pool: int,
    sampled: bool,
    limited: bool,
) -> tuple[jax.Array, Cache, list[Kept] | None]:
    """The tokens after the prompts, the cache of these, and the experts that what follows may use."""
    model = bind(config, params)
    rows, length = tokens_BS.shape
    start_B = length - ids_BS.sum(1)
    positions_BS = jnp.maximum(jnp.arange(length, dtype=jnp.int32).reshape(1, -1) - start_B[:, None], 0)
    hidden_BSD, routings, seen = model.extend(
        tokens_BS,
        ids_BS,
        positions_BS,
        pool=PoolConfig(kind="document", min=pool, max=pool) if pool else None,
        draws=fixed_pools(pool, rows, len(config.routed_experts)) if pool else None,
        kept=kept,
    )
    grow = ((0, 0), (0, slots - length), (0, 0), (0, 0))
    seen = [KeyValues(*(jnp.pad(x, grow) for x in own)) for own in seen]
    if pool:
        whole = jnp.array(True)
        kept = [
            Kept(routing.in_pool_BGR, kept[layer].renormalized if kept else whole)
            for layer, routing in enumerate(routings)
        ]
    token_B = _drawn(model, hidden_BSD[:, -1:], length - start_B, limits, sampled, limited)
    return token_B, Cache(seen, start_B, jnp.int32(length)), kept


def _decode(
    config: ModelConfig,
    params: Parameters,
    cache: Cache,
    token_B: jax.Array,
    limits: _Limits,
    kept: list[Kept] | None,
    *,
    sampled: bool,
    limited: bool,
) -> tuple[jax.Array, Cache]:
    """The tokens behind these, and the cache with these."""
    model = bind(config, params)
    tokens_B1, position_B = token_B[:, None], cache.slot - cache.start_B
    past = [Past(own, cache.start_B, cache.slot) for own in cache.seen]
    hidden_B1D, _, seen = model.extend(tokens_B1, jnp.ones_like(tokens_B1), position_B[:, None], past=past, kept=kept)
    token_B = _drawn(model, hidden_B1D, position_B + 1, limits, sampled, limited)
    return token_B, Cache(seen, cache.start_B, cache.slot + 1)


def _drawn(
    model: Transformer,
    hidden_B1D: jax.Array,
    position_B: jax.Array,
    limits: _Limits,
    sampled: bool,
    limited: bool,
) -> jax.Array:
    """The next token of each row, which will be at `position_B` of its document: int32 [B]."""
    logits_BV = model.logits(hidden_B1D)[:, 0]
    rows, vocabulary = logits_BV.shape
    id_1V = jnp.arange(vocabulary, dtype=jnp.int32).reshape(1, -1)
    logits_BV = jnp.where(id_1V < limits.tokens, logits_BV, -jnp.inf)
    if not sampled:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV /= limits.temperature
    if limited:
        # By falling logits: a token stays while fewer than k, and less than p, come before it.
        sorted_BV = jax.lax.sort(logits_BV, dimension=1)[:, ::-1]
        p_BV = jax.nn.softmax(sorted_BV)
        stays_BV = (id_1V < limits.top_k) & (jnp.cumsum(p_BV, axis=1) - p_BV < limits.top_p)
        least_B1 = jnp.where(stays_BV, sorted_BV, jnp.inf).min(1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)

    def draw(row: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(limits.key, row), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(jnp.arange(rows), position_B, logits_BV).astype(jnp.int32)
