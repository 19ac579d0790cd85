"""Twenty steps of training follow the public implementation's."""

import functools

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from emo_jax import interop
from emo_jax.config import OptimizerConfig
from emo_jax.training.optimizer import make_optimizer
from tests.interop.goldens import BALANCE_WEIGHT, FAST_COMPILE, GOLDEN, loss, needs_golden, relative

pytestmark = needs_golden
RUNS = ("train_emo_shared1", "train_stdmoe")


@functools.cache
def trained(run):
    """(config, golden trajectory, ours [steps, 4], final parameters by published name)."""
    golden = np.load(GOLDEN / run / "trajectory.npz")
    config = interop.read_config(GOLDEN / run)
    params = interop.read_parameters(GOLDEN / run, config)
    beta1, beta2 = golden["betas"].tolist()
    steps = len(golden["input_ids"])
    recipe = OptimizerConfig(
        learning_rate=golden["lr"].item(),
        schedule="constant",
        warmup_steps=0,
        beta1=beta1,
        beta2=beta2,
        epsilon=golden["eps"].item(),
        weight_decay=golden["weight_decay"].item(),
        clip_norm=golden["clip"].item(),
    )
    assert golden["lb_weight"].item() == BALANCE_WEIGHT
    optimizer = make_optimizer(recipe, steps)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def step(params, state, tokens_BS):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, (cross_entropy, balance, *_)), gradients = value_and_grad(params, config, tokens_BS)
        updates, state = optimizer.update(gradients, state, params)
        norm = optax.tree.norm(gradients)
        return optax.apply_updates(params, updates), state, (total, cross_entropy, balance, norm)

    state, ours = jax.jit(optimizer.init)(params), []
    for tokens_BS in golden["input_ids"]:
        params, state, numbers = step(params, state, tokens_BS)
        ours.append(numbers)
    return config, golden["loss_ce_lb_gradnorm"], np.array(ours), interop.to_public_names(params, config)


@pytest.mark.parametrize("run", RUNS)
def test_every_step_has_the_public_losses_and_gradient_norm(run):
    _, expected, ours, _ = trained(run)
    np.testing.assert_allclose(ours[:, :3], expected[:, :3], rtol=0, atol=2e-4)
    np.testing.assert_allclose(ours[:, 3], expected[:, 3], rtol=1e-3)


@pytest.mark.parametrize("run", RUNS)
def test_final_weights(run):
    config, _, _, ours = trained(run)
    final = load_file(GOLDEN / run / "final.safetensors")
    start = load_file(GOLDEN / run / "model.safetensors")

    def tree(tensors):  # without the router row of the shared expert, which nothing trains
        trained_rows = -config.num_shared_experts or None
        return np.concatenate(
            [(v[:trained_rows] if "mlp.gate" in k else v).ravel() for k, v in sorted(tensors.items())]
        )

    assert ours.keys() == final.keys()
    assert relative(tree(ours), tree(final)) <= 1e-3
    assert relative(tree(ours) - tree(start), tree(final) - tree(start)) <= 1e-2  # also of what training changed
