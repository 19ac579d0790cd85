"""The oracle against the public implementation's golden values, and against properties of the method."""

import json

import numpy as np
import pytest

from tests import oracle
from tests.interop.goldens import GOLDEN, needs_golden

MODELS = ("emo_tiny", "stdmoe_tiny", "emo_gqa", "emo_pruned")
ROUTERS = ("pool16_full", "pool5_shared2_e32", "pool6_shared1", "pool8_shared0")


def load_hugging_face(folder):
    """Parameters in the oracle's layout, and settings (no z-losses, as the goldens have none)."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()}
    D, H, shared = config["hidden_size"], config["num_attention_heads"], config["num_shared_experts"]
    layers = {}
    for i in range(config["num_hidden_layers"]):
        part = f"model.layers.{i}."

        def projection(name, part=part):
            return tensors[f"{part}self_attn.{name}_proj.weight"].reshape(-1, D // H, D).transpose(2, 0, 1)

        E = (config["num_experts_per_layer"] or [config["num_experts"]] * config["num_hidden_layers"])[i]
        R = E - shared
        experts = {
            name: np.stack([tensors[f"{part}mlp.experts.{e}.{name}_proj.weight"].T for e in range(E)])
            for name in ("gate", "up", "down")
        }
        moe = {
            "router": tensors[part + "mlp.gate.weight"][:R].T,
            "routed": {name: stacked[:R] for name, stacked in experts.items()},
        }
        if shared:  # side by side: one feed-forward of width s·F
            axis = {"gate": 1, "up": 1, "down": 0}
            moe["shared"] = {name: np.concatenate(list(stacked[R:]), axis[name]) for name, stacked in experts.items()}
        layers[f"{i:02d}"] = {
            "attention_norm": tensors[part + "pre_attention_layernorm.weight"],
            "attention": {
                "query": projection("q"),
                "key": projection("k"),
                "value": projection("v"),
                "out": tensors[part + "self_attn.o_proj.weight"].T.reshape(H, D // H, D),
            },
            "ffn_norm": tensors[part + "pre_feedforward_layernorm.weight"],
            "moe": moe,
        }
    params = {
        "embedding": tensors["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"].T,
    }
    settings = oracle.Settings(
        num_choices=config["num_experts_per_tok"] - shared,
        rope_theta=config["rope_theta"],
        norm_epsilon=config["rms_norm_eps"],
        balance_weight=config["router_aux_loss_coef"],
        router_z_weight=0.0,
        logits_z_weight=0.0,
    )
    return params, settings


def one_document_a_row(tokens_BS):
    """The goldens' batch: each row one document; its last token has no target."""
    mask_BS = np.ones(tokens_BS.shape, bool)
    mask_BS[:, -1] = False
    return {
        "tokens": tokens_BS,
        "targets": np.roll(tokens_BS, -1, axis=1),
        "document_ids": np.ones_like(tokens_BS),
        "positions": np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape),
        "loss_mask": mask_BS,
    }


@needs_golden
@pytest.mark.parametrize("name", MODELS)
def test_oracle_reproduces_the_public_model(name):
    from safetensors.numpy import load_file

    expected = load_file(GOLDEN / name / "expected.safetensors")
    params, settings = load_hugging_face(GOLDEN / name)
    losses = oracle.step_losses(params, one_document_a_row(expected["input_ids"]), settings)
    np.testing.assert_allclose(losses["forward"].logits_BSV, expected["logits"], atol=3e-5, rtol=0)
    for i, routing in enumerate(losses["forward"].routings):
        R = routing.logits_BSR.shape[-1]
        np.testing.assert_allclose(
            routing.logits_BSR.reshape(-1, R), expected[f"router_logits.{i}"][:, :R], atol=3e-5, rtol=0
        )
    np.testing.assert_allclose(losses["cross_entropy"], expected["ce_loss"][0], rtol=2e-6)
    np.testing.assert_allclose(np.mean(losses["balance"]), expected["lb_loss"][0], rtol=2e-6)
    np.testing.assert_allclose(losses["loss"], expected["loss"][0], rtol=2e-6)


@needs_golden
def test_finite_differences_reproduce_the_public_gradients():
    from safetensors.numpy import load_file

    expected = load_file(GOLDEN / "emo_gqa" / "expected.safetensors")
    params, settings = load_hugging_face(GOLDEN / "emo_gqa")
    batch = one_document_a_row(expected["input_ids"])

    def loss(moved):
        return oracle.step_losses(moved, batch, settings)["loss"]

    def largest(name):  # the entry that a small error could least hide in
        gradient = expected[name]
        return gradient[where := np.unravel_index(np.abs(gradient).argmax(), gradient.shape)], where

    N = params["layers"]["00"]["attention"]["query"].shape[-1]
    # Hugging Face stores [out, in]
    cases = {
        "grad.lm_head.weight": ("head", lambda out, d: (d, out)),
        "grad.model.layers.0.mlp.gate.weight": ("layers/00/moe/router", lambda out, d: (d, out)),
        "grad.model.layers.1.mlp.gate.weight": ("layers/01/moe/router", lambda out, d: (d, out)),
        "grad.model.layers.0.self_attn.q_proj.weight": (
            "layers/00/attention/query",
            lambda out, d: (d, out // N, out % N),
        ),
        "grad.model.layers.0.pre_attention_layernorm.weight": ("layers/00/attention_norm", lambda d: (d,)),
        "grad.model.embed_tokens.weight": ("embedding", lambda v, d: (v, d)),
    }
    for name, (path, index) in cases.items():
        gradient, where = largest(name)
        found = oracle.finite_difference(loss, params, path, index(*where))
        np.testing.assert_allclose(found, gradient, rtol=2e-4, atol=1e-7, err_msg=name)


@needs_golden
@pytest.mark.parametrize("run", ["train_emo_shared1", "train_stdmoe"])
def test_oracle_reproduces_the_first_step_of_the_public_training_run(run):
    params, settings = load_hugging_face(GOLDEN / run)
    trajectory = np.load(GOLDEN / run / "trajectory.npz")
    losses = oracle.step_losses(params, one_document_a_row(trajectory["input_ids"][0]), settings)
    found = [losses["loss"], losses["cross_entropy"], np.mean(losses["balance"])]
    np.testing.assert_allclose(found, trajectory["loss_ce_lb_gradnorm"][0, :3], rtol=2e-6)


def golden_router(name):
    golden = np.load(GOLDEN / f"router_{name}.npz")
    E, shared = int(golden["num_experts"]), int(golden["num_shared_experts"])
    router_DR = golden["weight"].reshape(E, -1).T[:, : E - shared].astype(np.float64)
    ids_BS = golden["document_ids"]
    sizes_BG = np.full((len(ids_BS), ids_BS.max()), int(golden["pool"]))
    settings = oracle.Settings(num_choices=int(golden["top_k"]) - shared, pool_kind="document")

    def route(x_BSD, router_DR):
        return oracle.route(x_BSD @ router_DR, ids_BS, settings, sizes_BG)

    return golden, router_DR, ids_BS, route


@needs_golden
@pytest.mark.parametrize("name", ROUTERS)
def test_oracle_reproduces_the_public_router(name):
    golden, router_DR, ids_BS, route = golden_router(name)
    routing = route(golden["x"].astype(np.float64), router_DR)
    C, R = routing.indices_BSC.shape[-1], router_DR.shape[1]
    np.testing.assert_array_equal(routing.indices_BSC, golden["expert_indices"][..., :C])
    np.testing.assert_allclose(routing.weights_BSC, golden["expert_weights"][..., :C], atol=1e-6, rtol=0)
    counts_R = np.bincount(routing.indices_BSC.ravel(), minlength=R)
    np.testing.assert_array_equal(counts_R, golden["counts"][:R])
    np.testing.assert_allclose(oracle.balance_loss(routing, ids_BS, "global"), golden["lb_loss"], rtol=1e-5)
    np.testing.assert_allclose(oracle.router_z_loss(routing, ids_BS), golden["z_loss"], rtol=1e-5)


@needs_golden
@pytest.mark.parametrize("name", ["pool6_shared1", "pool5_shared2_e32"])
def test_finite_differences_reproduce_the_public_router_gradients(name):
    golden, router_DR, ids_BS, route = golden_router(name)
    E = int(golden["num_experts"])
    gradient_ED = golden["grad_weight"].reshape(E, -1)

    def loss(params):
        routing = route(golden["x"].astype(np.float64), params["router"])
        C = routing.indices_BSC.shape[-1]
        aux = golden["lb_weight"] * oracle.balance_loss(routing, ids_BS, "global")
        aux = aux + golden["z_weight"] * oracle.router_z_loss(routing, ids_BS)
        return float(aux + (routing.weights_BSC * golden["cotangent"][..., :C]).sum())

    R = router_DR.shape[1]
    for flat in np.abs(gradient_ED[:R]).ravel().argsort()[-3:]:
        e, d = np.unravel_index(flat, gradient_ED[:R].shape)
        found = oracle.finite_difference(loss, {"router": router_DR}, "router", (d, e))
        np.testing.assert_allclose(found, gradient_ED[e, d], rtol=1e-4)


def small_model(rng, layers=("moe", "dense", "moe"), R=7, C=2, shared=True):
    """Random parameters of a small model with a dense layer in the middle, and its settings."""
    V, D, H, K, N, F = 11, 8, 2, 1, 4, 6

    def normal(*shape):
        return rng.normal(size=shape) * 0.5

    def ffn(*experts):
        return {"gate": normal(*experts, D, F), "up": normal(*experts, D, F), "down": normal(*experts, F, D)}

    def layer(kind):
        attention = {"query": normal(D, H, N), "key": normal(D, K, N), "value": normal(D, K, N), "out": normal(H, N, D)}
        moe = {"router": normal(D, R), "routed": ffn(R)} | ({"shared": ffn()} if shared else {})
        branch = {"ffn": ffn()} if kind == "dense" else {"moe": moe}
        return {"attention_norm": 1 + normal(D), "attention": attention, "ffn_norm": 1 + normal(D)} | branch

    params = {
        "embedding": normal(V, D),
        "layers": {f"{i:02d}": layer(kind) for i, kind in enumerate(layers)},
        "final_norm": 1 + normal(D),
        "head": normal(D, V),
    }
    return params, oracle.Settings(num_choices=C, pool_kind="document")


def small_batch(rng, lengths_per_row, S):
    """Rows of documents of the given lengths, padded to S."""
    batch = {name: np.zeros((len(lengths_per_row), S), int) for name in ("tokens", "targets", "positions")}
    batch["document_ids"] = np.zeros((len(lengths_per_row), S), int)
    batch["loss_mask"] = np.zeros((len(lengths_per_row), S), bool)
    for b, lengths in enumerate(lengths_per_row):
        start = 0
        for g, n in enumerate(lengths):
            tokens = rng.integers(0, 11, n)
            batch["tokens"][b, start : start + n] = tokens
            batch["targets"][b, start : start + n - 1] = tokens[1:]
            batch["loss_mask"][b, start : start + n - 1] = True
            batch["positions"][b, start : start + n] = np.arange(n)
            batch["document_ids"][b, start : start + n] = g + 1
            start += n
    return batch


ROWS = ([5, 4], [3, 3, 2], [10], [1, 6])
SCOPED = {"microbatches": 2, "local_rows": 1}


def numbers(losses):
    """The losses and statistics without the arrays."""
    return {name: value for name, value in losses.items() if name != "forward"}


def test_a_uniform_router_is_perfectly_balanced_in_every_scope():
    rng = np.random.default_rng(0)
    params, _ = small_model(rng)
    for name in ("00", "02"):
        params["layers"][name]["moe"]["router"] *= 0
    losses = oracle.step_losses(params, small_batch(rng, ROWS, 10), oracle.Settings(num_choices=2, **SCOPED))
    for scope in oracle.SCOPES:
        np.testing.assert_allclose(losses["balance_scopes"][scope], 1.0, rtol=1e-12)
    for statistics in losses["statistics"]:
        assert statistics["dead_experts"] == 5 and statistics["experts_per_document"] == 2
        np.testing.assert_allclose(statistics["load_max_over_mean"], 7 / 2)
        np.testing.assert_allclose([statistics["token_entropy"], statistics["document_entropy"]], np.log(7))


def test_padding_and_the_contents_of_padding_change_nothing():
    rng = np.random.default_rng(1)
    params, settings = small_model(rng)
    batch = small_batch(rng, ROWS, 10)
    sizes_LBG = rng.integers(2, 9, (2, 4, 3))
    plain = oracle.step_losses(params, batch, settings, sizes_LBG)
    padded = {name: np.pad(value, ((0, 2), (0, 3))) for name, value in batch.items()}
    padded["tokens"][padded["document_ids"] == 0] = 7
    found = oracle.step_losses(params, padded, settings, np.pad(sizes_LBG, ((0, 0), (0, 2), (0, 2))))
    assert np.isfinite(found["forward"].logits_BSV).all()
    for name in ("loss", "cross_entropy", "logits_z", "router_z", "loss_tokens", "routed_tokens"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-12)
    for scope in ("global", "local"):
        np.testing.assert_allclose(found["balance_scopes"][scope], plain["balance_scopes"][scope], rtol=1e-12)
    for with_padding, without in zip(found["statistics"], plain["statistics"], strict=True):
        np.testing.assert_allclose(list(with_padding.values()), list(without.values()), rtol=1e-12)


def test_a_document_does_not_see_its_neighbours():
    rng = np.random.default_rng(2)
    params, settings = small_model(rng)
    row = small_batch(rng, [[5, 4]], 9)
    alone = {name: value[:, 5:].copy() for name, value in row.items()}
    alone["document_ids"][:] = 1
    both = oracle.forward(params, row, settings, np.array([[[3, 4]], [[6, 2]]]))
    second = oracle.forward(params, alone, settings, np.array([[[4]], [[2]]]))
    np.testing.assert_allclose(both.logits_BSV[:, 5:], second.logits_BSV, rtol=1e-12)


def test_a_pool_of_all_experts_is_no_pool_and_a_pool_of_c_experts_leaves_no_choice():
    rng = np.random.default_rng(3)
    params, settings = small_model(rng)
    batch = small_batch(rng, ROWS, 10)
    free = oracle.step_losses(params, batch, oracle.Settings(num_choices=2))
    full = oracle.step_losses(params, batch, settings, np.full((2, 4, 3), 7))
    assert numbers(free) == numbers(full)
    tight = oracle.step_losses(params, batch, settings, np.full((2, 4, 3), 2))
    for routing, statistics in zip(tight["forward"].routings, tight["statistics"], strict=True):
        routed_BS = batch["document_ids"] > 0
        np.testing.assert_allclose(routing.weights_BSC[routed_BS].sum(-1), 1.0)
        assert statistics["experts_per_document"] == statistics["pool_size_max"] == 2


def test_forced_experts_count_towards_the_pool_and_ties_go_to_the_lower_index():
    score_R = np.array([0.2, 0.1, 0.2, 0.2, 0.0])
    np.testing.assert_array_equal(oracle.document_pool(score_R, 2), [1, 0, 1, 0, 0])
    np.testing.assert_array_equal(oracle.document_pool(score_R, 3, forced=1), [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(oracle.document_pool(score_R, 6, forced=1), [1, 1, 1, 1, 1])


def test_scopes_agree_where_their_groups_coincide():
    rng = np.random.default_rng(4)
    params, settings = small_model(rng)
    batch = small_batch(rng, ROWS, 10)
    ids_BS = batch["document_ids"]
    routing = oracle.forward(params, batch, settings, rng.integers(2, 9, (2, 4, 3))).routings[0]

    def loss(scope, **how):
        return oracle.balance_loss(routing, ids_BS, scope, **how)

    whole = loss("global")
    assert whole == loss("microbatch") == loss("buffer") == loss("local", local_rows=4)
    assert loss("microbatch", microbatches=2) == loss("local", local_rows=2) != whole
    first, second = (oracle.balance_loss(take(routing, rows), ids_BS[rows], "global") for rows in ([0, 1], [2, 3]))
    n, m = (ids_BS[:2] > 0).sum(), (ids_BS[2:] > 0).sum()
    np.testing.assert_allclose(loss("microbatch", microbatches=2), (n * first + m * second) / (n + m), rtol=1e-12)
    # Buffer by hand: the first microbatch has its own f, the second that of the whole step.
    w_SR = routing.masked_probabilities_BSR[2:][ids_BS[2:] > 0]
    f_R = np.bincount(routing.indices_BSC[ids_BS > 0].ravel(), minlength=7) / (n + m)
    by_hand = (n * first + m * 7 / 2 * (f_R @ w_SR.mean(0))) / (n + m)
    np.testing.assert_allclose(loss("buffer", microbatches=2), by_hand, rtol=1e-12)


def take(routing, rows):
    """The routing of some rows."""
    return type(routing)(**{name: value[rows] for name, value in vars(routing).items()})


def test_random_pools_follow_the_given_scores_and_normalised_weights_sum_to_one():
    rng = np.random.default_rng(5)
    params, _ = small_model(rng)
    batch = small_batch(rng, ROWS, 10)
    settings = oracle.Settings(num_choices=2, pool_kind="random", normalize_top_k=True)
    scores_LBGR = rng.random((2, 4, 3, 7))
    out = oracle.forward(params, batch, settings, np.full((2, 4, 3), 3), scores_LBGR)
    for routing, scores_BGR in zip(out.routings, scores_LBGR, strict=True):
        for b, s in np.argwhere(batch["document_ids"] > 0):
            best = scores_BGR[b, batch["document_ids"][b, s] - 1].argsort()[-3:]
            assert set(routing.indices_BSC[b, s]) <= set(best)
            np.testing.assert_allclose(routing.weights_BSC[b, s].sum(), 1.0)
            np.testing.assert_allclose(routing.masked_probabilities_BSR[b, s, best].sum(), 1.0)
