"""Does opening up a dense model help? `python benchmarks/emoe.py --corpus=DIR [--parts=speed,layer,tuning,bridge]`.

DIR holds train.jsonl.gz and heldout.jsonl.gz, documents with a domain. Finished runs and measurements are kept in
--out, so the command can be stopped and started again. Numbers are means over seeds with their range.

speed: a training step of a dense model and of the same one with split layers, turn by turn, and the FLOPs of the gate.

layer: one layer forward and backward: dense, with its blocks masked (what emo_jax does), and with its blocks as
dispatched experts; --layer=WIDTH,HIDDEN,TOKENS in --dtype.

tuning: a dense model is pretrained on some domains and fine-tuned on others, split in different ways (arXiv
2310.10908). Every arm has the same data, steps and learning rate, the best for the dense arm. Losses are of test
documents without near-duplicates: of the domains it was tuned on, of those it was pretrained on, and of one that it
never saw. `merged` is the same model with every expert in use; `masks alone` is what the split costs the pretrained
model on its domains before any tuning.

bridge: does a dense model that was trained with document pools over blocks of its own neurons keep more of a domain
when only some blocks stay than one that was trained plainly and split afterwards? Blocks are chosen for each domain on
documents that neither trained on, all layers at once; no fine-tuning, no pools. Specificity: nats that other domains'
blocks cost a domain beyond its own, at 8 of 32.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import modularity
import numpy as np
from _timing import median_ms, versions
from modularity import CALIBRATION_DOCUMENTS, cell, documents, run_folder, test_batches

from emo_jax.config import BalanceConfig, Config, ModelConfig, PoolConfig
from emo_jax.modularity import Statistics, score

PRETRAINED = ("math_word_problems", "geography", "standards", "python_code", "c_code", "scripture", "german_law")
TUNED = ("medical_qa", "economics", "shell_help")
UNSEEN = ("dialogue",)
TEST_DOCUMENTS = 20
BLOCKS = 32  # of neurons in the bridge
KEEPS = (16, 8, 4)
CRITERIA = ("easy_ep", "router_mass")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)

LAST_TWO = {"layers": (2, 3), "experts": 64, "top_k": 16}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "EMoE": LAST_TWO,
    "EMoE, contiguous": LAST_TWO | {"method": "contiguous"},
    "EMoE, random": LAST_TWO | {"method": "random"},
    "EMoE, coactivation": LAST_TWO | {"method": "coactivation"},
    "EMoE-L": LAST_TWO | {"gate": "cosine"},
    "GMoE": {"layers": (2, 3), "experts": 4, "top_k": 1, "gate": "cosine", "copies": True},
    "EMoE, importance and noise": LAST_TWO | {"paper_losses": True},
    "EMoE, k/N 1/8": LAST_TWO | {"top_k": 8},
    "EMoE, k/N 1/2": LAST_TWO | {"top_k": 32},
    "EMoE, last layer": LAST_TWO | {"layers": (3,)},
    "EMoE, all layers": LAST_TWO | {"layers": (0, 1, 2, 3)},
}
_LATE_WHOLE = {"pool.min": 8, "pool.max": 8, "pool.whole_fraction": 0.75, "pool.whole_step": 0.8}
BRIDGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "pools of 8, late three quarters without": _LATE_WHOLE,
    "pools of 8 to 32": {"pool.min": 8, "pool.max": 32},
    "pools of 8, learned gate": _LATE_WHOLE | {"model.split_gate": "cosine"},
}
"""Steps as a share of all."""


def base(out: Path, steps: int, seed: int) -> Config:
    """The dense model that is pretrained; all else as in the retention study."""
    run = modularity.base(out, out, steps, seed)
    return dataclasses.replace(
        run,
        model=ModelConfig(
            vocab_size=1024, d_model=96, num_layers=4, num_heads=3, num_experts=0, d_dense=384, dtype="float32"
        ),
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(weight=0.0, router_z_weight=0.0),
        data=dataclasses.replace(run.data, path=str(out / "pretrain.jsonl")),
        optimizer=dataclasses.replace(run.optimizer, learning_rate=2e-3, warmup_steps=min(50, steps // 2)),
    )


def write_texts(corpus: Path, out: Path) -> None:
    """The texts to pretrain and to tune on."""
    out.mkdir(parents=True, exist_ok=True)
    for name, domains in (("pretrain", PRETRAINED), ("tune", TUNED)):
        if not (out / f"{name}.jsonl").exists():
            lines = [json.dumps(d) + "\n" for d in documents(corpus / "train.jsonl.gz") if d["domain"] in domains]
            (out / f"{name}.jsonl").write_text("".join(lines))


def trained(config: Config, folder: Path) -> Path:
    """The folder of a run, trained if it is not yet."""
    from emo_jax.training import train

    if not (folder / "done").exists():
        start = time.perf_counter()
        train(config, folder, log=lambda text: None)
        (folder / "done").touch()
        print(f"{folder.name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def pretrained(args: argparse.Namespace, seed: int) -> Path:
    """The dense model of a seed."""
    return trained(base(args.out, args.steps, seed), run_folder(args.out, "dense model", seed))


# ------------------------------------------------------------------------------------------------------------- tuning


def plain(name: str) -> str:
    """An arm's name in a folder's."""
    return name.replace("/", " of ").replace(",", "")


def split_folder_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where the split model of an arm is kept."""
    return run_folder(args.out, f"split {plain(name)}", seed)


def split_model(args: argparse.Namespace, dense: Path, arm: dict[str, Any], folder: Path) -> Path:
    """A folder with the dense model split as the arm says; itself where it says nothing."""
    from emo_jax.data import domain_batches, open_store
    from emo_jax.modularity.calibration import coactivations
    from emo_jax.training.splitting import split_folder
    from emo_jax.training.weights import load_parameters

    if not arm:
        return dense
    options = {name: value for name, value in arm.items() if name != "paper_losses"}
    if not folder.exists():

        def firing(layers):
            run, params, _ = load_parameters(dense)
            store = open_store(run.data.cache_dir)
            texts = domain_batches(store.heldout, store.domains, run.data, 16, CALIBRATION_DOCUMENTS)
            return coactivations(run.model, params, itertools.chain.from_iterable(texts.values()), layers)

        split_folder(dense, folder, **options, firing=firing, log=lambda text: None)
    return folder


def tuned(args: argparse.Namespace, name: str, seed: int, rate: float) -> dict[str, Any]:
    """Test losses of a fine-tuned arm by domain: as it was tuned, and merged."""
    from emo_jax.data import open_store
    from emo_jax.modularity import SubsetLosses, emergent
    from emo_jax.training.weights import load_parameters, saved_model

    arm, dense = ARMS[name], pretrained(args, seed)
    folder = run_folder(args.out, f"tuned {plain(name)} {rate:g}", seed)
    file = folder / "losses.json"
    if file.exists():
        return json.loads(file.read_text())
    origin = split_model(args, dense, arm, split_folder_of(args, name, seed))
    config = base(args.out, args.tuning_steps, seed)
    config.model = saved_model(origin)
    config.data = dataclasses.replace(
        config.data,
        path=str(args.out / "tune.jsonl"),
        cache_dir=str(args.out / "tuning"),
        tokenizer=str(args.out / "tokens" / "tokenizer.json"),
    )
    config.optimizer = dataclasses.replace(
        config.optimizer,
        learning_rate=rate,
        schedule="linear",
        final_fraction=0.0,
        warmup_steps=args.tuning_steps // 10,
    )
    config.train.init_from = str(origin)
    if arm.get("paper_losses"):
        config.balance = BalanceConfig(weight=0.01, kind="importance", gate_noise=1.0, router_z_weight=0.0)
    elif arm.get("gate"):
        config.balance = BalanceConfig(weight=0.01, router_z_weight=0.0)
    _, params, _ = load_parameters(trained(config, folder))
    test, _, _ = test_batches(
        args.corpus, open_store(config.data.cache_dir), (*PRETRAINED, *TUNED, *UNSEEN), config.data, TEST_DOCUMENTS
    )
    made = {"tuned": {d: loss.loss for d, loss in SubsetLosses(config.model, params, test).full().items()}}
    if arm and not arm.get("copies"):
        made["merged"] = {
            d: loss.loss for d, loss in SubsetLosses(*emergent.merge(config.model, params), test).full().items()
        }
    file.write_text(json.dumps(made))
    return made


def masks_alone(args: argparse.Namespace, name: str, seed: int) -> float:
    """Nats that using some of the experts costs the pretrained model, not tuned yet, on the domains that it knows."""
    from emo_jax.data import open_store
    from emo_jax.modularity import SubsetLosses, emergent
    from emo_jax.training.weights import load_parameters

    folder = split_folder_of(args, name, seed)
    file = folder / "masks.json"
    if not file.exists():
        run, params, _ = load_parameters(folder)
        data = base(args.out, args.steps, seed).data
        test, _, _ = test_batches(args.corpus, open_store(data.cache_dir), PRETRAINED, data, TEST_DOCUMENTS)
        pairs = (run.model, params), emergent.merge(run.model, params)
        with_masks, without = (SubsetLosses(*pair, test).full() for pair in pairs)
        file.write_text(json.dumps(float(np.mean([with_masks[d].loss - without[d].loss for d in PRETRAINED]))))
    return json.loads(file.read_text())


def mean(losses: dict[str, float], domains: tuple[str, ...]) -> float:
    """Over domains."""
    return float(np.mean([losses[domain] for domain in domains]))


def tuning(args: argparse.Namespace) -> str:
    """The table of fine-tuned arms."""
    of_rate = {rate: mean(tuned(args, "dense", 0, rate)["tuned"], TUNED) for rate in RATES}
    rate = min(of_rate, key=of_rate.__getitem__)
    results = {name: [tuned(args, name, seed, rate) for seed in range(args.seeds)] for name in args.arms.split(";")}
    dense = results["dense"]
    tried = ", ".join(f"{r:g}: {loss:.3f}" for r, loss in of_rate.items())
    lines = [
        f"Learning rate {rate:g}, the best of the dense arm, seed 0 ({tried}). Δ: minus the dense arm.",
        "",
        "| arm | tuned on | Δ | Δ, merged | pretrained on, Δ | unseen, Δ | masks alone |",
        "|" + "---|" * 7,
    ]
    for name, made in results.items():

        def against(kind: str, domains: tuple[str, ...], made=made) -> str:
            pairs = zip(made, dense, strict=True)
            values = [mean(m[kind], domains) - mean(d["tuned"], domains) for m, d in pairs if kind in m]
            return cell(values)

        row = [
            name,
            cell([mean(m["tuned"], TUNED) for m in made], sign=False),
            against("tuned", TUNED),
            against("merged", TUNED),
        ]
        row += [against("tuned", PRETRAINED), against("tuned", UNSEEN)]
        masks = bool(ARMS[name]) and not ARMS[name].get("copies")
        row.append(cell([masks_alone(args, name, seed) for seed in range(args.seeds)] if masks else []))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- bridge


def bridged(args: argparse.Namespace, name: str, method: str, seed: int) -> dict[str, Any]:
    """Retention of a dense model, plainly trained or with pools of its own neurons, split into blocks."""
    from emo_jax.data import domain_batches, open_store
    from emo_jax.modularity import Subset, SubsetLosses, calibrate, emergent, fingerprint
    from emo_jax.modularity.calibration import coactivations
    from emo_jax.training.weights import load_parameters

    config = base(args.out, args.steps, seed)
    if BRIDGE[name]:
        config.model = emergent.split_config(config.model, layers=range(4), experts=BLOCKS, top_k=BLOCKS)
        config.pool = PoolConfig(kind="document", min=8, max=8)
        config.balance = BalanceConfig(weight=0.1, router_z_weight=0.0)
        for field, value in BRIDGE[name].items():
            section, field = field.split(".")
            value = round(value * args.steps) if field.endswith("_step") else value
            setattr(config, section, dataclasses.replace(getattr(config, section), **{field: value}))
        folder = trained(config, run_folder(args.out, f"bridge {name.replace(',', '')}", seed))
    else:
        folder = pretrained(args, seed)
    file = folder / f"retention-{method}.json"
    if file.exists():
        return json.loads(file.read_text())
    _, params, _ = load_parameters(folder)
    store = open_store(config.data.cache_dir)
    calibration = domain_batches(store.heldout, store.domains, config.data, 16, CALIBRATION_DOCUMENTS)
    model = config.model
    if not model.split_layers:
        model = emergent.split_config(model, layers=range(4), experts=BLOCKS, top_k=BLOCKS)
        firing = None
        if method == "coactivation":
            firing = coactivations(config.model, params, itertools.chain.from_iterable(calibration.values()), range(4))
        read = functools.partial(functools.reduce, lambda node, key: node[key])
        orders = emergent.neuron_orders(model, lambda path: np.asarray(read(path, params)), method, firing=firing)
        params = emergent.split(model, params, orders)
    test, _, _ = test_batches(args.corpus, store, store.domains, config.data, TEST_DOCUMENTS)
    losses = SubsetLosses(model, params, test)
    full = {domain: loss.loss for domain, loss in losses.full().items()}
    kept: dict[str, dict[str, float]] = {}
    subsets: dict[str, Subset] = {}
    model_print = fingerprint(model, params)
    for domain in test:
        statistics = calibrate(model, params, calibration[domain])
        chosen = {f"{by} {keep}": best(statistics, by, keep) for by in CRITERIA for keep in KEEPS}
        chosen["random 8"] = [np.random.default_rng(layer).permutation(BLOCKS)[:8] for layer in range(4)]
        for name_, experts in chosen.items():
            subset = Subset(tuple(tuple(sorted(map(int, layer))) for layer in experts), model_print)
            kept.setdefault(name_, {})[domain] = losses.under(subset, domain).loss
            if name_ == f"{CRITERIA[0]} 8":
                subsets[domain] = subset
    others = [losses.under(subsets[d], e).loss - kept[f"{CRITERIA[0]} 8"][e] for d in test for e in test if d != e]
    made = {"full": full, "kept": kept, "specificity": float(np.mean(others))}
    file.write_text(json.dumps(made))
    return made


def best(statistics: Sequence[Statistics], criterion: str, keep: int) -> list[np.ndarray]:
    """The blocks of each layer with the best scores, all layers scored on the whole model."""
    return [np.argsort(-score(criterion, layer), kind="stable")[:keep] for layer in statistics]


def bridge(args: argparse.Namespace) -> str:
    """The table of retention curves."""
    lines = [
        "| model | blocks by | chosen by | full loss | 16 of 32 | 8 of 32 | 4 of 32 | random 8 | specificity |",
        "|" + "---|" * 9,
    ]
    rows = [("plain", method) for method in ("contiguous", "kmeans", "coactivation")]
    rows += [(name, "contiguous") for name in BRIDGE if name != "plain"]
    for name, method in rows:
        made = [bridged(args, name, method, seed) for seed in range(args.seeds)]

        def added(result: dict[str, Any], chosen: str) -> float:
            return mean(result["kept"][chosen], PRETRAINED) - mean(result["full"], PRETRAINED)

        for criterion in CRITERIA:
            row = [name, method, criterion, cell([mean(m["full"], PRETRAINED) for m in made], sign=False)]
            row += [cell([added(m, f"{criterion} {keep}") for m in made]) for keep in KEEPS]
            row.append(cell([added(m, "random 8") for m in made]))
            row.append(cell([m["specificity"] for m in made], sign=False) if criterion == CRITERIA[0] else "")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- speed


def speed(args: argparse.Namespace) -> str:
    """Times of a step, turn by turn, and the gate's FLOPs."""
    from emo_jax.model import abstract_parameters, bind
    from emo_jax.training.step import init_state, make_train_step, run_mesh

    dense = base(args.out, 100, 0)
    dense.model = dataclasses.replace(
        dense.model, d_model=512, d_dense=2048, num_layers=6, num_heads=8, vocab_size=8192
    )
    dense.data = dataclasses.replace(dense.data, batch_size=4)
    rng = np.random.default_rng(0)
    shape = (dense.data.batch_size, dense.data.sequence_length)
    batch = {
        "tokens": rng.integers(0, 8192, shape).astype(np.int32),
        "targets": rng.integers(0, 8192, shape).astype(np.int32),
        "document_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "loss_mask": np.ones(shape, bool),
    }
    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "dense, built again": {},  # what a difference means
        "EMoE, last layer, k 16 of 64": {"split_layers": (5,)},
        "EMoE, last two layers": {"split_layers": (4, 5)},
        "EMoE, all layers": {"split_layers": tuple(range(6))},
        "EMoE, last two, k 32": {"split_layers": (4, 5), "split_top_k": 32},
        "EMoE-L, last two layers": {"split_layers": (4, 5), "split_gate": "cosine"},
    }
    steps: dict[str, Callable[[], None]] = {}
    flops = {}
    for name, fields in kinds.items():
        config = dataclasses.replace(dense, balance=BalanceConfig(weight=0.0, router_z_weight=0.0))
        if fields:
            config.model = dataclasses.replace(dense.model, **({"split_experts": 64, "split_top_k": 16} | fields))
        mesh = run_mesh(config)
        step, held = make_train_step(config, mesh), [init_state(config, mesh)]

        def run(step=step, held=held) -> None:
            held[0], metrics = step(held[0], batch)
            jax.block_until_ready(metrics)

        def forward(params, config=config):
            return bind(config.model, params)(
                *(jnp.asarray(batch[n]) for n in ("tokens", "document_ids", "positions"))
            )[0]

        analysis = jax.jit(forward).lower(abstract_parameters(config.model)).compile().cost_analysis()
        flops[name] = analysis["flops"]
        run()
        run()
        steps[name] = run
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.repeats):
        for name in rng.permutation(list(steps)):  # turn by turn, so that all see the same machine
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    lines = ["| step | median ms | × dense | forward FLOPs × dense |", "|" + "---|" * 4]
    for name, seconds in times.items():
        ratio = float(np.median(np.array(seconds) / np.array(times["dense"])))
        lines.append(f"| {name} | {1e3 * np.median(seconds):.0f} | {ratio:.3f} | {flops[name] / flops['dense']:.4f} |")
    return "\n".join(lines)


def layer(args: argparse.Namespace) -> str:
    """Times of a layer's three forms, which must agree."""
    from emo_jax.kernels.experts import routed_experts

    width, hidden, tokens = map(int, args.layer.split(","))
    experts, choices, size = 64, 16, hidden // 64
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    shapes = ((tokens, width), (width, hidden), (width, hidden), (hidden, width))
    arguments = [jnp.asarray(draw(shape) * shape[0] ** -0.5, args.dtype) for shape in shapes]

    def choose(x, gate):
        return jax.lax.top_k(x @ jax.lax.stop_gradient(gate).reshape(width, experts, size).mean(-1), choices)[1]

    def dense(x, gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    def masked(x, gate, up, down):
        mask = jax.nn.one_hot(choose(x, gate), experts, dtype=x.dtype).sum(1)
        hidden_act = jax.nn.silu(x @ gate) * (x @ up)
        return (hidden_act.reshape(tokens, experts, size) * mask[..., None]).reshape(tokens, hidden) @ down

    def by_dispatch(x, gate, up, down):
        blocks = [w.reshape(width, experts, size).swapaxes(0, 1) for w in (gate, up)]
        ones = jnp.ones((tokens, choices))
        return routed_experts(x, choose(x, gate), ones, *blocks, down.reshape(experts, size, width))

    want = np.asarray(jax.jit(masked)(*arguments), np.float32)
    lines = [f"{versions()}, {width} × {hidden}, {tokens} tokens, {choices} of {experts} experts, {args.dtype}", ""]
    lines += ["| layer, forward and backward | ms | largest difference |", "|" + "---|" * 3]
    for name, fn in (("dense", dense), ("masked", masked), ("dispatched", by_dispatch)):
        try:
            took = median_ms(jax.jit(jax.grad(lambda *a, fn=fn: jnp.square(fn(*a)).sum(), (0, 1, 2, 3))), *arguments)
        except jax.errors.JaxRuntimeError as failure:
            lines.append(f"| {name} | {str(failure)[:60]} | |")
            continue
        error = np.abs(np.asarray(jax.jit(fn)(*arguments), np.float32) - want).max() / np.abs(want).max()
        lines.append(f"| {name} | {took:.2f} | {'' if name == 'dense' else f'{error:.0e}'} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing of each part and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path, default=Path("runs/emoe"))
    parser.add_argument("--parts", default="speed,layer,tuning,bridge")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of pretraining, 4096 tokens each")
    parser.add_argument("--tuning_steps", type=int, default=80)
    parser.add_argument("--arms", default=";".join(ARMS), help="of the tuning, separated by ;")
    parser.add_argument("--repeats", type=int, default=15, help="of a timed step")
    parser.add_argument("--layer", default="512,2048,1024", help="the timed layer")
    parser.add_argument("--dtype", default="float32", help="its dtype")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts.split(","):
        if part in ("tuning", "bridge"):
            if args.corpus is None:
                print(f"{part} needs texts of labelled domains: --corpus=DIR with train.jsonl.gz and heldout.jsonl.gz.")
                continue
            write_texts(args.corpus, args.out)
        table = {"speed": speed, "layer": layer, "tuning": tuning, "bridge": bridge}[part](args)
        (args.out / f"{part}.md").write_text(table + "\n")
        print(f"\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
