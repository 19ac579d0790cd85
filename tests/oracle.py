"""One training step's forward pass, losses and statistics in float64 NumPy: loops, no tricks, tiny sizes only.

Written from the specification (DESIGN section 2) without sight of `emo_jax.model`, `kernels` or `training`, which
tests compare with it. Balance counts f, pools and choices are piecewise constant, so away from ties the central
difference of a loss here is the gradient that the step must have with all three held constant.

Dimension letters: B rows, S sequence, G documents in a row, V vocabulary, D model, H query heads, N head width,
R routed experts, C choices among them, F expert hidden, L mixture layers.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SCOPES = ("global", "buffer", "microbatch", "local")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the arrays do not say; the sizes are read off the parameters."""

    num_choices: int
    """C = top_k − shared experts."""
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-6
    normalize_top_k: bool = False
    pool_kind: str = "none"
    """`none`, `document`, or `random` (the given scores stand in for the document sums)."""
    forced: int = 0
    always_active: Sequence[int] = ()
    """Experts that every token chooses, first; in `route` alone."""
    balance_scope: str = "global"
    balance_weight: float = 0.1
    router_z_weight: float = 1e-3
    logits_z_weight: float = 1e-5
    microbatches: int = 1
    """Consecutive equal parts of the rows; matters to the scopes `microbatch` and `buffer` alone."""
    local_rows: int = 1

    @classmethod
    def of(cls, model: Any, pool: Any = None, balance: Any = None, **others: Any) -> "Settings":
        """Reads a ModelConfig and, where given, a PoolConfig and a BalanceConfig; `others` win."""
        fields: dict[str, Any] = {
            "num_choices": model.top_k - model.num_shared_experts,
            "rope_theta": model.rope_theta,
            "norm_epsilon": model.norm_epsilon,
            "normalize_top_k": model.normalize_top_k,
        }
        if pool is not None:
            fields |= {"pool_kind": pool.kind, "forced": pool.forced}
        if balance is not None:
            fields |= {"balance_scope": balance.scope, "balance_weight": balance.weight}
            fields |= {"router_z_weight": balance.router_z_weight, "local_rows": balance.local_rows}
        return cls(**(fields | others))


@dataclasses.dataclass
class Routing:
    """What one mixture layer decided. Rows of id 0 hold zeros and −1; documents that do not occur, an empty pool."""

    logits_BSR: np.ndarray
    """z, before any mask."""
    probabilities_BSR: np.ndarray
    """p = softmax(z), unmasked."""
    pool_BGR: np.ndarray
    """Whether document g + 1 may use expert r."""
    masked_logits_BSR: np.ndarray
    """z': −inf outside the pool."""
    masked_probabilities_BSR: np.ndarray
    """w = softmax(z')."""
    indices_BSC: np.ndarray
    """Choices in falling order of w."""
    weights_BSC: np.ndarray
    """Their weights in the sum of experts."""


@dataclasses.dataclass
class Forward:
    """Logits and one `Routing` a mixture layer, in order."""

    logits_BSV: np.ndarray
    routings: list[Routing]


def softmax(z_R: np.ndarray) -> np.ndarray:
    """exp(z) / Σ exp(z) of one vector that has a finite entry."""
    exp_R = np.exp(z_R - z_R.max())
    return exp_R / exp_R.sum()


def logsumexp(z_R: np.ndarray) -> float:
    """log Σ exp(z) of one vector that has a finite entry."""
    return float(z_R.max() + np.log(np.exp(z_R - z_R.max()).sum()))


def entropy(p_R: np.ndarray) -> float:
    """−Σ p log p in nats, 0 log 0 = 0."""
    return float(-sum(p * np.log(p) for p in p_R if p > 0))


def rms_norm(x_SD: np.ndarray, scale_D: np.ndarray, epsilon: float) -> np.ndarray:
    """x / √(mean x² + ε) · scale, over the last dimension."""
    return x_SD / np.sqrt((x_SD**2).mean(-1, keepdims=True) + epsilon) * scale_D


def feed_forward(x_D: np.ndarray, gate_DF: np.ndarray, up_DF: np.ndarray, down_FD: np.ndarray) -> np.ndarray:
    """down(silu(gate x) ⊙ up x) for one token."""
    a_F = x_D @ gate_DF
    return (a_F / (1 + np.exp(-a_F)) * (x_D @ up_DF)) @ down_FD


def rotate(x_N: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotary embedding of one head at one position: entry i pairs with entry i + N/2."""
    half = len(x_N) // 2
    out_N = np.zeros_like(x_N)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_N))
        out_N[i] = x_N[i] * np.cos(angle) - x_N[i + half] * np.sin(angle)
        out_N[i + half] = x_N[i + half] * np.cos(angle) + x_N[i] * np.sin(angle)
    return out_N


def attention(
    x_SD: np.ndarray, weights: Mapping[str, np.ndarray], ids_S: np.ndarray, positions_S: np.ndarray, theta: float
) -> np.ndarray:
    """Causal attention of one row within each document; padding sees earlier padding."""
    query_DHN, key_DKN, value_DKN, out_HND = (weights[name] for name in ("query", "key", "value", "out"))
    H, N = query_DHN.shape[1:]
    group = H // key_DKN.shape[1]
    y_SD = np.zeros_like(x_SD)
    for h in range(H):
        value_SN = x_SD @ value_DKN[:, h // group]
        query_SN, key_SN = x_SD @ query_DHN[:, h], x_SD @ key_DKN[:, h // group]
        query_SN = np.stack([rotate(q_N, p, theta) for q_N, p in zip(query_SN, positions_S, strict=True)])
        key_SN = np.stack([rotate(k_N, p, theta) for k_N, p in zip(key_SN, positions_S, strict=True)])
        for s in range(len(x_SD)):
            seen = [t for t in range(s + 1) if ids_S[t] == ids_S[s]]
            share = softmax(key_SN[seen] @ query_SN[s] * N**-0.5)
            y_SD[s] += (share @ value_SN[seen]) @ out_HND[h]
    return y_SD


def document_pool(score_R: np.ndarray, size: int, forced: int = 0) -> np.ndarray:
    """Items 3–4: the `size` experts of largest score, ties to the lower index, the last `forced` always among them."""
    R = len(score_R)
    if size >= R:
        return np.ones(R, bool)
    free = sorted(range(R - forced), key=lambda r: (-score_R[r], r))
    pool_R = np.zeros(R, bool)
    pool_R[free[: max(size - forced, 0)]] = True
    pool_R[R - forced :] = True
    return pool_R


def route(
    logits_BSR: np.ndarray,
    document_ids_BS: np.ndarray,
    settings: Settings,
    pool_sizes_BG: np.ndarray | None = None,
    scores_BGR: np.ndarray | None = None,
    voters_BS: np.ndarray | None = None,
) -> Routing:
    """Items 2–5 of one mixture layer, from its router logits; the pool is chosen by all of a document's tokens, or by
    the voters among them."""
    B, S, R = logits_BSR.shape
    C = settings.num_choices
    G = int(document_ids_BS.max(initial=0)) if pool_sizes_BG is None else pool_sizes_BG.shape[1]
    routing = Routing(
        logits_BSR=logits_BSR,
        probabilities_BSR=np.zeros((B, S, R)),
        pool_BGR=np.zeros((B, G, R), bool),
        masked_logits_BSR=np.zeros((B, S, R)),
        masked_probabilities_BSR=np.zeros((B, S, R)),
        indices_BSC=np.full((B, S, C), -1),
        weights_BSC=np.zeros((B, S, C)),
    )
    for b in range(B):
        for document in sorted(set(document_ids_BS[b].tolist()) - {0}):
            g = document - 1
            tokens = [s for s in range(S) if document_ids_BS[b, s] == document]
            for s in tokens:
                routing.probabilities_BSR[b, s] = softmax(logits_BSR[b, s])
            if settings.pool_kind == "none":
                pool_R = np.ones(R, bool)
            elif settings.pool_kind == "document":
                voters = [s for s in tokens if voters_BS is None or voters_BS[b, s]]
                score_R = sum((routing.probabilities_BSR[b, s] for s in voters), np.zeros(R))
                score_R[list(settings.always_active)] = np.inf
                pool_R = document_pool(score_R, int(pool_sizes_BG[b, g]), settings.forced)
            elif settings.pool_kind == "random":
                pool_R = document_pool(scores_BGR[b, g, :R], int(pool_sizes_BG[b, g]), settings.forced)
            else:
                raise ValueError(f"unknown pool_kind {settings.pool_kind!r}")
            routing.pool_BGR[b, g] = pool_R
            for s in tokens:
                masked_R = np.where(pool_R, logits_BSR[b, s], -np.inf)
                w_R = softmax(masked_R)
                always = settings.always_active
                chosen_C = sorted(range(R), key=lambda r: (r not in always, r if r in always else -masked_R[r], r))[:C]
                weights_C = w_R[chosen_C]
                if settings.normalize_top_k:
                    weights_C = weights_C / weights_C.sum()
                routing.masked_logits_BSR[b, s] = masked_R
                routing.masked_probabilities_BSR[b, s] = w_R
                routing.indices_BSC[b, s] = chosen_C
                routing.weights_BSC[b, s] = weights_C
    return routing


def mixture(x_SD: np.ndarray, moe: Mapping[str, Any], indices_SC: np.ndarray, weights_SC: np.ndarray) -> np.ndarray:
    """Item 6 for one row: y = Σ w · routed(x) + shared(x); a token without choices (id 0) gets 0."""
    y_SD = np.zeros_like(x_SD)
    routed = moe["routed"]
    for s, x_D in enumerate(x_SD):
        if indices_SC[s, 0] < 0:
            continue
        for e, w in zip(indices_SC[s], weights_SC[s], strict=True):
            y_SD[s] += w * feed_forward(x_D, routed["gate"][e], routed["up"][e], routed["down"][e])
        if "shared" in moe:
            y_SD[s] += feed_forward(x_D, *(moe["shared"][name] for name in ("gate", "up", "down")))
    return y_SD


def forward(
    params: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    settings: Settings,
    pool_sizes_LBG: Sequence[np.ndarray] | np.ndarray | None = None,
    scores_LBGR: Sequence[np.ndarray] | np.ndarray | None = None,
) -> Forward:
    """The transformer on the batch's `tokens`, `document_ids` and `positions` (and `voters`, where it has some); l
    counts mixture layers only."""
    params = as_float64(params)
    tokens_BS, ids_BS, positions_BS = (np.asarray(batch[n]) for n in ("tokens", "document_ids", "positions"))
    epsilon = settings.norm_epsilon
    x_BSD = params["embedding"][tokens_BS]
    routings: list[Routing] = []
    for name in sorted(params["layers"]):
        layer = params["layers"][name]
        for b in range(len(x_BSD)):
            h_SD = rms_norm(x_BSD[b], layer["attention_norm"], epsilon)
            x_BSD[b] += attention(h_SD, layer["attention"], ids_BS[b], positions_BS[b], settings.rope_theta)
        h_BSD = rms_norm(x_BSD, layer["ffn_norm"], epsilon)
        if "ffn" in layer:
            ffn = [layer["ffn"][n] for n in ("gate", "up", "down")]
            x_BSD += np.stack([[feed_forward(h_D, *ffn) for h_D in h_SD] for h_SD in h_BSD])
            continue
        i = len(routings)
        sizes_BG = None if pool_sizes_LBG is None else np.asarray(pool_sizes_LBG[i])
        scores_BGR = None if scores_LBGR is None else np.asarray(scores_LBGR[i])
        logits_BSR = h_BSD @ layer["moe"]["router"]
        routing = route(logits_BSR, ids_BS, settings, sizes_BG, scores_BGR, batch.get("voters"))
        for b in range(len(x_BSD)):
            x_BSD[b] += mixture(h_BSD[b], layer["moe"], routing.indices_BSC[b], routing.weights_BSC[b])
        routings.append(routing)
    return Forward(rms_norm(x_BSD, params["final_norm"], epsilon) @ params["head"], routings)


def balance_loss(
    routing: Routing, document_ids_BS: np.ndarray, scope: str, microbatches: int = 1, local_rows: int = 1
) -> float:
    """Item 7: (R / C) · Σ_e f_e · p̄_e; groups of rows are averaged by their share of the routed tokens."""
    B = len(document_ids_BS)
    C, R = routing.indices_BSC.shape[-1], routing.logits_BSR.shape[-1]
    if B % microbatches:
        raise ValueError(f"{B} rows do not split into {microbatches} equal microbatches")
    group = {"global": B, "microbatch": B // microbatches, "buffer": B // microbatches, "local": local_rows}[scope]
    step_tokens = int((document_ids_BS > 0).sum())
    loss = 0.0
    seen_R, seen_tokens = np.zeros(R), 0  # the buffer of arXiv 2501.11873, Algorithm 1: this step so far
    for start in range(0, B, group):
        counts_R, sum_R, tokens = np.zeros(R), np.zeros(R), 0
        for b in range(start, min(start + group, B)):
            for s in np.flatnonzero(document_ids_BS[b] > 0):
                tokens += 1
                sum_R += routing.masked_probabilities_BSR[b, s]
                for e in routing.indices_BSC[b, s]:
                    counts_R[e] += 1
        if tokens == 0:
            continue
        seen_R, seen_tokens = seen_R + counts_R, seen_tokens + tokens
        f_R = seen_R / seen_tokens if scope == "buffer" else counts_R / tokens
        loss += tokens / step_tokens * (R / C) * float(f_R @ (sum_R / tokens))
    return loss


def router_z_loss(routing: Routing, document_ids_BS: np.ndarray) -> float:
    """Item 8: mean over routed tokens of logsumexp(z')²."""
    routed = np.argwhere(document_ids_BS > 0)
    return sum(logsumexp(routing.masked_logits_BSR[b, s]) ** 2 for b, s in routed) / max(len(routed), 1)


def routing_statistics(routing: Routing, document_ids_BS: np.ndarray) -> dict[str, float]:
    """What a run logs of one layer, over the step's routed tokens and its documents."""
    R = routing.logits_BSR.shape[-1]
    loads_R = np.zeros(R)
    token_entropies, masses, document_entropies, unique, sizes = [], [], [], [], []
    for b, ids_S in enumerate(document_ids_BS):
        for document in sorted(set(ids_S.tolist()) - {0}):
            tokens = np.flatnonzero(ids_S == document)
            pool_R = routing.pool_BGR[b, document - 1]
            p_SR = routing.probabilities_BSR[b, tokens]
            token_entropies += [entropy(p_R) for p_R in p_SR]
            masses += [p_R[pool_R].sum() for p_R in p_SR]
            document_entropies.append(entropy(p_SR.mean(0)))
            sizes.append(int(pool_R.sum()))
            chosen = routing.indices_BSC[b, tokens].ravel().tolist()
            unique.append(len(set(chosen)))
            for e in chosen:
                loads_R[e] += 1
    if not sizes:
        sizes, unique, masses, token_entropies, document_entropies = [0], [0], [0.0], [0.0], [0.0]
    return {
        "load_max_over_mean": float(loads_R.max() / loads_R.mean()) if loads_R.any() else 0.0,
        "dead_experts": int((loads_R == 0).sum()),
        "token_entropy": float(np.mean(token_entropies)),
        "document_entropy": float(np.mean(document_entropies)),
        "pool_mass": float(np.mean(masses)),
        "experts_per_document": float(np.mean(unique)),
        "pool_size_mean": float(np.mean(sizes)),
        "pool_size_min": min(sizes),
        "pool_size_max": max(sizes),
    }


def step_losses(
    params: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    settings: Settings,
    pool_sizes_LBG: Sequence[np.ndarray] | np.ndarray | None = None,
    scores_LBGR: Sequence[np.ndarray] | np.ndarray | None = None,
) -> dict[str, Any]:
    """Items 7–9 of one step: `loss` and its parts.

    `cross_entropy`, `logits_z`; per mixture layer `balance` (the configured scope), `balance_scopes` (a list a
    scope), `router_z`, `statistics`; `loss_tokens`, `routed_tokens`, and `forward` itself.
    """
    out = forward(params, batch, settings, pool_sizes_LBG, scores_LBGR)
    ids_BS, targets_BS = np.asarray(batch["document_ids"]), np.asarray(batch["targets"])
    cross_entropy, logits_z = 0.0, 0.0
    loss_tokens = np.argwhere(np.asarray(batch["loss_mask"]))
    for b, s in loss_tokens:
        log_partition = logsumexp(out.logits_BSV[b, s])
        cross_entropy += (log_partition - out.logits_BSV[b, s, targets_BS[b, s]]) / len(loss_tokens)
        logits_z += log_partition**2 / len(loss_tokens)
    scopes = {
        scope: [balance_loss(r, ids_BS, scope, settings.microbatches, settings.local_rows) for r in out.routings]
        for scope in SCOPES
    }
    balance = scopes[settings.balance_scope]
    router_z = [router_z_loss(r, ids_BS) for r in out.routings]
    L = max(len(out.routings), 1)
    loss = cross_entropy + settings.logits_z_weight * logits_z
    loss += settings.balance_weight / L * sum(balance) + settings.router_z_weight / L * sum(router_z)
    return {
        "loss": float(loss),
        "cross_entropy": float(cross_entropy),
        "logits_z": float(logits_z),
        "balance": balance,
        "balance_scopes": scopes,
        "router_z": router_z,
        "statistics": [routing_statistics(r, ids_BS) for r in out.routings],
        "loss_tokens": len(loss_tokens),
        "routed_tokens": int((ids_BS > 0).sum()),
        "forward": out,
    }


def as_float64(tree: Any) -> Any:
    """A nested dict of anything array-like as fresh-or-shared float64 NumPy arrays."""
    if isinstance(tree, Mapping):
        return {name: as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def finite_difference(
    loss_fn: Callable[[Any], float],
    params: Mapping[str, Any],
    path: str,
    index: int | tuple[int, ...],
    eps: float = 1e-6,
) -> float:
    """(loss(θ + ε) − loss(θ − ε)) / 2ε for one entry of the leaf at `path` ("layers/00/moe/router")."""
    losses = []
    for step in (eps, -eps):
        moved = copy.deepcopy(as_float64(params))
        leaf = moved
        for name in path.split("/"):
            leaf = leaf[name]
        leaf[index] += step
        losses.append(loss_fn(moved))
    return (losses[0] - losses[1]) / (2 * eps)
