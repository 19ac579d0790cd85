"""What do pools cost and caches save when a model serves text? Losses under a prompt's pool, hits of an expert cache.

Letters: B rows, S sequence, G documents a row, R routed experts, C choices, L mixture layers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.errors import require
from emo_jax.evaluation.heldout import Loss
from emo_jax.inference import fixed_pools
from emo_jax.model import Kept, ModelConfig, PoolConfig, bind, token_losses

Batches = list[dict[str, np.ndarray]]
WHOLE = 2**30
"""As the length of a prompt: all of the document, which no model that writes it could know."""


class Served:
    """A model as it serves documents whose first tokens are a prompt; compiled once for all pools and prompts.

    A layer's pool is chosen by the router probabilities of the prompt's tokens, summed, and frozen: prompt and
    continuation use no other expert (as `emo_jax.generate --pool=prompt:N`).
    """

    def __init__(self, config: ModelConfig, params: Any, test: dict[str, Batches], behind: int):
        """For the test batches of each domain, all of one shape.

        Args:
          config: of the model.
          params: its parameters.
          test: batches, by the contract of `emo_jax.data`.
          behind: losses are of the tokens behind the first so many of a document, so that the same tokens count
            whatever the prompt.

        Raises:
          UserError: where a domain has no document that long.
        """
        self._params, self._test, self._experts = params, test, max(config.routed_experts, default=0)
        for domain, batches in test.items():
            longest = max(int((batch["positions"] * batch["loss_mask"]).max()) for batch in batches)
            require(
                longest >= behind - 1,
                f"{domain} has no document of more than {behind} tokens in a row, the longest prompt; give shorter "
                "prompts.",
            )
        documents = max(int(batch["document_ids"].max()) for batches in test.values() for batch in batches)
        layers = len(config.routed_experts)
        # Sizes are drawn by the caller: the range that is written here is not used.
        pool = PoolConfig(kind="document", min=config.fewest_experts, max=max(self._experts, config.fewest_experts))

        def run(params: Any, batch: dict[str, jax.Array], size: Any, prompt: Any, kept: Sequence[Kept] | None) -> Any:
            model = bind(config, params)
            hidden_BSD, routings = model(
                batch["tokens"],
                batch["document_ids"],
                batch["positions"],
                documents=documents,
                pool=pool if layers else None,
                draws=fixed_pools(size, batch["tokens"].shape[0], layers, documents) if layers else None,
                voters_BS=batch["positions"] < prompt,
                kept=kept,
            )
            return model, hidden_BSD, [routing.indices_BSC for routing in routings]

        @jax.jit
        def losses(*arguments: Any) -> jax.Array:
            model, hidden_BSD, _ = run(*arguments)
            batch = arguments[1]
            features_BSD, head_DV = model.readout(hidden_BSD)
            loss_BS, hit_BS = token_losses(features_BSD, head_DV, batch["targets"])
            counted_BS = batch["loss_mask"] & (batch["positions"] >= behind - 1)
            return jnp.stack([jnp.where(counted_BS, x, 0).sum() for x in (loss_BS, hit_BS, jnp.ones_like(loss_BS))])

        self._losses = losses
        self._choices = jax.jit(lambda *arguments: run(*arguments)[2])

    def loss(self, domain: str, size: int = 0, prompt: int = WHOLE, kept: Sequence[Kept] | None = None) -> Loss:
        """Of a domain's tokens behind the longest prompt.

        Args:
          domain: its name.
          size: routed experts in the pool; 0: no pool.
          prompt: tokens that choose it.
          kept: a subset of the experts; None: all.
        """
        parts = [self._losses(self._params, batch, size or self._experts, prompt, kept) for batch in self._test[domain]]
        loss, hits, tokens = np.asarray(jax.device_get(parts), np.float64).sum(axis=0)
        return Loss(float(loss / tokens), float(hits / tokens), int(tokens))

    def choices(self, domain: str, size: int = 0, prompt: int = WHOLE) -> Iterator[np.ndarray]:
        """The routed experts that each token of each of a domain's documents chooses: int32 [L, S, C] a document."""
        for batch in self._test[domain]:
            chosen = jax.device_get(self._choices(self._params, batch, size or self._experts, prompt, None))
            chosen_LBSC = np.stack(chosen)
            for row, ids_S in enumerate(batch["document_ids"]):
                for document in range(1, ids_S.max(initial=0) + 1):
                    yield chosen_LBSC[:, row, ids_S == document]


def switching(documents: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
    """One document of each domain in turn, until a domain has no more: the stream of a server that all ask at once."""
    return [document for turn in zip(*documents.values(), strict=False) for document in turn]


def cache_hits(documents: Iterable[np.ndarray], experts: int) -> np.ndarray:
    """Share of expert uses that a cache of the least recently used experts of each layer answers, for every size.

    Tokens come one after the other, as in decoding a single text; an expert that is not in the cache is loaded and
    drives out the one whose last use is longest ago.

    Args:
      documents: chosen experts, int32 [L, S, C] each (see `Served.choices`).
      experts: R, the most of any layer.

    Returns:
      float64 [R]: at place n − 1 for a cache of n experts a layer.
    """
    found_R, uses = np.zeros(experts), 0
    recent: dict[int, list[int]] = {}
    for document_LSC in documents:
        for layer, chosen_SC in enumerate(document_LSC):
            order = recent.setdefault(layer, [])  # the last used first; a cache of n holds the first n
            uses += chosen_SC.size
            for expert in chosen_SC.ravel().tolist():
                if expert in order:
                    place = order.index(expert)
                    found_R[place] += 1
                    del order[place]
                order.insert(0, expert)
    require(uses > 0, "There are no documents to simulate a cache with.")
    return np.cumsum(found_R) / uses
