"""Held-out cross-entropy by domain.

Letters: B rows, S sequence, G documents a row, Z domains.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from emo_jax.errors import require
from emo_jax.kernels.experts import default_implementation
from emo_jax.model import ModelConfig, bind, token_losses
from emo_jax.parallel import put_rows


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """Cross-entropy of held-out documents, in nats a token.

    Attributes:
      loss: over all tokens.
      tokens: how many were predicted.
      domains: loss and tokens of each domain that has any.
    """

    loss: float
    tokens: int
    domains: dict[str, tuple[float, int]]

    def to_json(self) -> dict[str, Any]:
        """As it stands in `metrics.jsonl`."""
        domains = {name: {"loss": loss, "tokens": tokens} for name, (loss, tokens) in self.domains.items()}
        return {"loss": self.loss, "tokens": self.tokens, "domains": domains}


def make_heldout_loss(
    config: ModelConfig, mesh: Mesh, domains: Sequence[str]
) -> Callable[[Any, Iterable[dict[str, np.ndarray]]], HeldoutLoss]:
    """Builds (params, batches) → `HeldoutLoss`; compiled once, one transfer back at the end.

    Args:
      config: of the model.
      mesh: where batches are split.
      domains: names, in the order of the batches' `document_domains`.

    The returned function raises `UserError` without batches. They follow the contract of `emo_jax.data`, with
    `document_domains` int32 [B, G] beside.
    """
    implementation = default_implementation(mesh.devices.flat[0].platform)

    @jax.jit
    def sums(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = bind(config, params)
        ids_BS, domains_BG = batch["document_ids"], batch["document_domains"]
        hidden_BSD, _ = model(
            batch["tokens"],
            ids_BS,
            batch["positions"],
            documents=domains_BG.shape[1],
            mesh=mesh,
            implementation=implementation,
        )
        loss_BS, _ = token_losses(hidden_BSD, model.head[...], batch["targets"], mesh)
        domain_BS = jnp.take_along_axis(domains_BG, jnp.maximum(ids_BS - 1, 0), axis=1)
        weights_BSZ = jax.nn.one_hot(domain_BS, len(domains), dtype=loss_BS.dtype) * batch["loss_mask"][..., None]
        return jnp.stack([(loss_BS[..., None] * weights_BSZ).sum((0, 1)), weights_BSZ.sum((0, 1))])

    def heldout_loss(params: Any, batches: Iterable[dict[str, np.ndarray]]) -> HeldoutLoss:
        parts = [sums(params, put_rows(batch, mesh)) for batch in batches]
        require(bool(parts), "There are no held-out batches to evaluate on.")
        total_2Z = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
        per_domain = {
            name: (float(loss / tokens), int(tokens))
            for name, loss, tokens in zip(domains, *total_2Z, strict=True)
            if tokens
        }
        loss, tokens = total_2Z.sum(1)
        return HeldoutLoss(float(loss / max(tokens, 1)), int(tokens), per_domain)

    return heldout_loss
