"""A whole step in float64 against the NumPy oracle: forward, losses, statistics, and gradients by differences."""

import jax
import numpy as np
import pytest

from emo_jax.model.routing import random_scores
from tests import oracle
from tests.training import tiny

SCOPES = {
    "global": {},
    "buffer": {"train": {"microbatches": 4}},
    "microbatch": {"train": {"microbatches": 4}},
    "local": {"balance": {"local_rows": 2}, "train": {"microbatches": 2}},
}


def run_for(scope: str, **sections):
    merged = {name: dict(fields) for name, fields in SCOPES[scope].items()}
    merged.setdefault("balance", {})["scope"] = scope
    for name, fields in sections.items():
        merged[name] = merged.get(name, {}) | fields
    return tiny.config(**merged)


def make_oracle(run, batch, step=0):
    """params → the oracle's losses, with the draws that the step makes."""
    settings = oracle.Settings.of(
        run.model,
        run.pool,
        run.balance,
        microbatches=run.train.microbatches,
        logits_z_weight=run.train.logits_z_weight,
    )
    if run.pool.kind == "none":
        return lambda params: oracle.step_losses(params, batch, settings)
    drawn = tiny.draws(run, step)
    sizes = np.moveaxis(np.asarray(drawn.size_BLG), 1, 0)
    scores = None
    if run.pool.kind == "random":
        seeds = np.moveaxis(np.asarray(drawn.seed_BLG), 1, 0)
        scores = [np.asarray(random_scores(s, r)) for s, r in zip(seeds, run.model.routed_experts, strict=True)]
    return lambda params: oracle.step_losses(params, batch, settings, sizes, scores)


@pytest.mark.parametrize("kind", ["document", "random", "none"])
@pytest.mark.parametrize("scope", SCOPES)
def test_losses_and_statistics_are_the_oracles(scope, kind):
    with jax.enable_x64(True):
        run = run_for(scope, pool={"kind": kind, "forced": 1 if kind == "document" else 0})
        batch = tiny.batch()
        _, metrics = tiny.gradients(run, batch)
        expected = make_oracle(run, batch)(tiny.parameters(run))
    for name in ("loss", "cross_entropy", "logits_z"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-9)
    np.testing.assert_allclose(metrics["routing"]["balance"], expected["balance"], rtol=1e-9)
    np.testing.assert_allclose(metrics["routing"]["router_z"], expected["router_z"], rtol=1e-9)
    for name in expected["statistics"][0]:
        wanted = [layer[name] for layer in expected["statistics"]]
        np.testing.assert_allclose(metrics["routing"][name], wanted, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_are_the_oracles_finite_differences(scope):
    with jax.enable_x64(True):
        # Weights that make every loss term visible in the gradient.
        run = run_for(scope, balance={"weight": 1.0, "router_z_weight": 0.1})
        batch = tiny.batch()
        grads, _ = tiny.gradients(run, batch)
        params, losses = tiny.parameters(run), make_oracle(run, batch)
        paths = (
            "embedding",
            "head",
            "layers/00/moe/router",
            "layers/00/moe/routed/gate",
            "layers/00/moe/shared/down",
            "layers/00/attention/key",
            "layers/01/ffn/up",
            "layers/02/moe/router",
            "layers/02/moe/routed/down",
        )
        for path in paths:
            grad = grads
            for name in path.split("/"):
                grad = grad[name]
            index = np.unravel_index(np.abs(grad).argmax(), grad.shape)  # where an error could least hide
            wanted = oracle.finite_difference(lambda moved: losses(moved)["loss"], params, path, index, eps=1e-6)
            np.testing.assert_allclose(grad[index], wanted, rtol=2e-6, err_msg=path)
