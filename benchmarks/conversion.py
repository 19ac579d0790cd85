"""Memory and time of converting at the released width: `python benchmarks/conversion.py [--layers=3 --folder=DIR]`.

Writes a Hugging Face folder with the geometry of the released model (128 experts of which 1 is shared, D 2048, F 1024,
V 100352; random bfloat16) and a few layers, then imports it, loads 16 experts a layer of what came of it and of the
folder itself, exports the model cut to them, and lets both models write a few tokens. Each in a process of its own,
started as the programs start theirs.
Memory is the peak resident size of that process (VmHWM) less its resident size when all was imported (VmRSS).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from emo_jax.cli import HUGE_PAGES
from emo_jax.interop import read_config, read_routers
from emo_jax.modularity import Subset, fingerprint

EXPERTS, SHARED, D, F, V, HEADS = 128, 1, 2048, 1024, 100_352, 16
GIB = 2**30


def status(name: str) -> int:
    """A field of this process's memory, in bytes."""
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index(f"{name}:") + 1])


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published tensors."""
    yield "model.embed_tokens.weight", (V, D)
    yield "lm_head.weight", (V, D)
    yield "model.norm.weight", (D,)
    for i in range(layers):
        here = f"model.layers.{i}"
        for name in ("pre_attention_layernorm", "pre_feedforward_layernorm"):
            yield f"{here}.{name}.weight", (D,)
        for name in "qkvo":
            yield f"{here}.self_attn.{name}_proj.weight", (D, D)
        yield f"{here}.mlp.gate.weight", (EXPERTS, D)
        for e in range(EXPERTS):
            yield f"{here}.mlp.experts.{e}.gate_proj.weight", (F, D)
            yield f"{here}.mlp.experts.{e}.up_proj.weight", (F, D)
            yield f"{here}.mlp.experts.{e}.down_proj.weight", (D, F)


def make(folder: Path, layers: int) -> None:
    """The folder, of random finite numbers, in files of about 1 GB."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    index: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in tensors(layers):
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & 0xBFFF  # exponents of finite numbers
        shard[name] = bits.view(ml_dtypes.bfloat16).reshape(shape)
        if sum(tensor.nbytes for tensor in shard.values()) > 10**9:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    values = {
        "model_type": "emo",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_shared_experts": SHARED,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(values))
    config = read_config(folder)
    kept = tuple(tuple(sorted(rng.permutation(EXPERTS - SHARED)[:16].tolist())) for _ in range(layers))
    subset = Subset(kept, fingerprint(config, read_routers(folder, config)))
    (folder.parent / "subset.json").write_text(subset.to_json())


def imported(folder: Path) -> Callable[[], int]:
    """Imports, and tells the bytes of the largest leaf of a layer."""
    from emo_jax.training.conversion import import_folder

    def run() -> int:
        import_folder(folder / "public", folder / "model")
        return (EXPERTS - SHARED) * D * F * 2

    return run


def loaded(name: str) -> Callable[[Path], Callable[[], int]]:
    """Loads the subset from one of the folders, and tells its bytes."""

    def prepare(folder: Path) -> Callable[[], int]:
        import jax

        from emo_jax.training.weights import saved_fingerprint, saved_model, saved_parameters

        def run() -> int:
            subset = Subset.load(folder / "subset.json")
            subset.check(saved_model(folder / name), saved_fingerprint(folder / name))
            params = saved_parameters(folder / name, kept=subset.experts)
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
            return sum(leaf.nbytes for leaf in jax.tree.leaves(params))

        return run

    return prepare


def exported(folder: Path) -> Callable[[], int]:
    """Exports the model cut to the subset, and tells the bytes of the largest leaf."""
    from emo_jax.training.conversion import export_folder

    def run() -> int:
        export_folder(folder / "model", folder / "cut", subset=folder / "subset.json")
        return V * D * 2

    return run


def written(cut: bool) -> Callable[[Path], Callable[[], int]]:
    """Loads the model, or its subset, and lets it write; tells the bytes of its parameters."""

    def prepare(folder: Path) -> Callable[[], int]:
        import jax

        import emo_jax
        from emo_jax.training import weights  # noqa: F401  (what load imports)

        def run() -> int:
            model = emo_jax.load(folder / "model", folder / "subset.json" if cut else None)
            model.generate([[1, 2, 3]], max_new_tokens=8)
            return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))

        return run

    return prepare


STEPS = {
    "import": (imported, lambda size: 2 * size + GIB, "2 × largest leaf of a layer + 1 GiB"),
    "load 16 experts, saved model": (loaded("model"), lambda size: 1.3 * size, "1.3 × the subset"),
    "load 16 experts, Hugging Face": (loaded("public"), lambda size: 1.3 * size, "1.3 × the subset"),
    "export of the cut model": (exported, lambda size: 2 * size + 2 * GIB, "2 × largest leaf + twice 1 GiB of shard"),
    "write with all experts": (written(False), lambda size: 2.5 * size, "2.5 × the model"),
    "write with 16 experts": (written(True), lambda size: 2.5 * size, "2.5 × the subset"),
}
"""What is measured, and the most memory that it may take."""


def child(step: str, folder: Path) -> None:
    """One step in this process; prints JSON."""
    run = STEPS[step][0](folder)
    before, start = status("VmRSS"), time.perf_counter()
    size = run()
    print(json.dumps([size, time.perf_counter() - start, status("VmHWM") - before, before]))


def main() -> int:
    """Measures and prints; 1 where something takes more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the gigabytes go; default: a temporary folder, deleted")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        child(args.step, args.folder)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "subset.json").exists():
            make(folder / "public", args.layers)
        total = sum(file.stat().st_size for file in (folder / "public").iterdir())
        print(f"{args.layers} layers, {total / 1e9:.2f} GB of bfloat16 in {folder / 'public'}")
        for step, (_, bar, words) in STEPS.items():
            command = [sys.executable, __file__, f"--folder={folder}", f"--step={step}"]
            answer = subprocess.run(command, env=os.environ | HUGE_PAGES, stdout=subprocess.PIPE, check=True, text=True)
            size, seconds, peak, before = json.loads(answer.stdout.splitlines()[-1])
            held = peak <= bar(size)
            failed |= not held
            print(
                f"{step}: {seconds:.1f} s, peak {peak / GIB:.2f} GiB above the {before / GIB:.2f} GiB after imports; "
                f"may be {bar(size) / GIB:.2f} GiB ({words}, {size / GIB:.2f} GiB): {'holds' if held else 'fails'}"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
