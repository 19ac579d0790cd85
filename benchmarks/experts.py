"""Routed experts, forward and backward, by formulation and geometry: `python benchmarks/experts.py`.

Every formulation runs in one process after another on the same inputs; `reference` computes every expert
on every token, so its time is left out where it would take minutes.
"""

import jax
import jax.numpy as jnp
from _timing import median_ms, versions

from emo_jax.kernels.experts import IMPLEMENTATIONS, routed_experts

GEOMETRIES = (
    # tokens, D, routed experts, choices, F
    (4096, 64, 31, 3, 32),
    (4096, 128, 31, 3, 64),
    (4096, 128, 127, 7, 64),
)
MOST_REFERENCE_GFLOP = 60


def main() -> None:
    """Prints a line a geometry and formulation."""
    print(versions())
    print(
        f"{'tokens':>6} {'D':>4} {'R':>4} {'C':>2} {'F':>4}  {'formulation':<12} {'forward':>10} {'with backward':>14}"
    )
    for tokens, d, experts, choices, f in GEOMETRIES:
        keys = jax.random.split(jax.random.key(0), 5)
        x = jax.random.normal(keys[0], (tokens, d))
        gate, up = (jax.random.normal(key, (experts, d, f)) * d**-0.5 for key in keys[1:3])
        down = jax.random.normal(keys[3], (experts, f, d)) * f**-0.5
        weights, indices = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[4], (tokens, experts))), choices)
        for name in IMPLEMENTATIONS:
            if name != "blocked" and tokens * experts * d * f * 18 / 1e9 > MOST_REFERENCE_GFLOP:
                continue  # on CPU, ragged_dot computes every expert too

            def forward(x, weights, indices, gate, up, down, name=name):
                return routed_experts(x, indices, weights, gate, up, down, implementation=name)

            def total(*args, forward=forward):
                return jnp.square(forward(*args)).sum()

            args = (x, weights, indices, gate, up, down)
            ms = median_ms(jax.jit(forward), *args), median_ms(jax.jit(jax.grad(total, argnums=(0, 1, 3, 4, 5))), *args)
            shape = f"{tokens:>6} {d:>4} {experts:>4} {choices:>2} {f:>4}"
            print(f"{shape}  {name:<12} {ms[0]:>7.1f} ms {ms[1]:>11.1f} ms", flush=True)


if __name__ == "__main__":
    main()
