"""Held-out cross-entropy and next-token accuracy by domain, and which experts the documents' tokens chose.

Letters: B rows, S sequence, G documents a row, Z domains, R routed experts, L mixture layers, M documents.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emo_jax.errors import require
from emo_jax.kernels.experts import default_implementation
from emo_jax.model import Kept, ModelConfig, bind, token_losses
from emo_jax.model.routing import Routing
from emo_jax.parallel import MeshConfig, put_rows, replicated


class Loss(NamedTuple):
    """How well some tokens are predicted.

    Attributes:
      loss: mean cross-entropy, in nats a token.
      accuracy: share of tokens that have the largest logit.
      tokens: how many were predicted.
    """

    loss: float
    accuracy: float
    tokens: int


class Choices(NamedTuple):
    """What the tokens of some documents chose. The parts of a document that was cut at a row's end are documents here.

    Attributes:
      domain_M: int32, the place of each document's domain among all.
      count_LMR: of each mixture layer, float32: how many of a document's tokens chose each expert.
    """

    domain_M: np.ndarray
    count_LMR: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """Prediction of held-out documents.

    Attributes:
      all: over all tokens.
      domains: of each domain that has any.
      choices: of their tokens.
    """

    all: Loss
    domains: dict[str, Loss]
    choices: Choices = dataclasses.field(compare=False)  # arrays

    def to_json(self) -> dict[str, Any]:
        """As it stands in `metrics.jsonl`."""
        return self.all._asdict() | {"domains": {name: loss._asdict() for name, loss in self.domains.items()}}


def make_heldout_loss(
    config: ModelConfig, mesh: Mesh, domains: Sequence[str], exchange: MeshConfig | None = None
) -> Callable[..., HeldoutLoss]:
    """Builds (params, batches, kept=None, rows=None) → `HeldoutLoss`; compiled once, one transfer back at the end.

    Args:
      config: of the model.
      mesh: where batches are split.
      domains: names, in the order of the batches' `document_domains`.
      exchange: how tokens reach experts on other devices; None: by default.

    The returned function raises `UserError` without batches. They follow the contract of `emo_jax.data`, with
    `document_domains` int32 [B, G] beside. `kept` is a subset of the experts, one `Kept` a mixture layer; `rows`
    are those of whole batches, where several processes each have some.
    """
    implementation = default_implementation(mesh.devices.flat[0].platform)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sums(params: Any, batch: dict[str, jax.Array], kept: Sequence[Kept] | None) -> tuple:
        model = bind(config, params)
        ids_BS, domains_BG = batch["document_ids"], batch["document_domains"]
        hidden_BSD, routings = model(
            batch["tokens"],
            ids_BS,
            batch["positions"],
            documents=domains_BG.shape[1],
            mesh=mesh,
            exchange=exchange,
            implementation=implementation,
            kept=kept,
            token_types_BS=batch.get("token_types"),
        )
        loss_BS, hit_BS = token_losses(*model.readout(hidden_BSD), batch["targets"], mesh)
        domain_BS = jnp.take_along_axis(domains_BG, jnp.maximum(ids_BS - 1, 0), axis=1)
        weights_BSZ = jax.nn.one_hot(domain_BS, len(domains), dtype=loss_BS.dtype) * batch["loss_mask"][..., None]
        values_3BS = (loss_BS, hit_BS.astype(loss_BS.dtype), jnp.ones_like(loss_BS))
        sums_3Z = jnp.stack([(value_BS[..., None] * weights_BSZ).sum((0, 1)) for value_BS in values_3BS])
        counts = [_counts(routing, ids_BS, domains_BG.shape[1]) for routing in routings]
        return sums_3Z, domains_BG.reshape(-1), counts

    def mean(loss: float, hits: float, tokens: float) -> Loss:
        return Loss(float(loss / max(tokens, 1)), float(hits / max(tokens, 1)), int(tokens))

    def heldout_loss(
        params: Any,
        batches: Iterable[dict[str, np.ndarray]],
        kept: Sequence[Kept] | None = None,
        rows: int | None = None,
    ) -> HeldoutLoss:
        parts = [sums(params, put_rows(batch, mesh, rows), kept) for batch in batches]
        require(bool(parts), "There are no held-out batches to evaluate on.")
        sums_3Z, domain_M, count_LMR = zip(*jax.device_get(parts), strict=True)
        total_3Z = np.stack(sums_3Z).sum(axis=0, dtype=np.float64)
        per_domain = {name: mean(*column) for name, column in zip(domains, total_3Z.T, strict=True) if column[2]}
        return HeldoutLoss(mean(*total_3Z.sum(1)), per_domain, _joined(domain_M, count_LMR))

    return heldout_loss


def _counts(routing: Routing, ids_BS: jax.Array, documents: int) -> jax.Array:
    """How many tokens of each document chose each expert: float32 [B·G, R]."""
    expert_R = jnp.arange(routing.logits_BSR.shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1)
    chosen_BSR = (routing.indices_BSC[..., None] == expert_R).any(2)
    inside_BSG = ids_BS[..., None] == jnp.arange(1, documents + 1, dtype=jnp.int32).reshape(1, 1, -1)
    # Zeros and ones are exact in bfloat16, and so are their sums in float32.
    ones = (a.astype(jnp.bfloat16) for a in (inside_BSG, chosen_BSR))
    count_BGR = jnp.einsum("bsg,bsr->bgr", *ones, preferred_element_type=jnp.float32)
    return count_BGR.reshape(-1, count_BGR.shape[-1])


def _joined(domain_M: Sequence[np.ndarray], count_LMR: Sequence[list[np.ndarray]]) -> Choices:
    """Of all batches, without the places that no document took."""
    layers = [np.concatenate(layer) for layer in zip(*count_LMR, strict=True)]
    every_M = np.concatenate(domain_M)
    used_M = layers[0].any(1) if layers else np.zeros(len(every_M), bool)
    return Choices(every_M[used_M], [layer[used_M] for layer in layers])
