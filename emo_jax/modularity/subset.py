"""Subsets of a model's experts: a small file that can be applied, cut out, composed and merged back.

Letters: R routed experts of the full model, L mixture layers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.errors import UserError, require, require_choice
from emo_jax.model import Kept, ModelConfig
from emo_jax.model.functional import LeafPath, leaf_at

FORMAT_VERSION = 1
OPERATIONS = ("union", "intersection", "difference")


@dataclasses.dataclass(frozen=True)
class Subset:
    """The routed experts to keep in each mixture layer.

    Attributes:
      experts: ascending indices into the full model's routed experts, one tuple a mixture layer.
      model: fingerprint of the full model.
      method: how they were chosen.
      data: fingerprint of what they were chosen on; empty for none.
    """

    experts: tuple[tuple[int, ...], ...]
    model: str
    method: str = ""
    data: str = ""

    def to_json(self) -> str:
        """As it is stored."""
        values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "The subset") -> "Subset":
        """The inverse of `to_json`.

        Raises:
          UserError: on anything else.
        """
        try:
            values = json.loads(text)
            version = values.pop("format_version")
            experts = tuple(tuple(sorted(int(expert) for expert in layer)) for layer in values.pop("experts"))
            subset = cls(experts=experts, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is not a subset that emo_jax.select wrote ({error}).") from None
        require(version == FORMAT_VERSION, f"{name} has format {version}, this version reads {FORMAT_VERSION}.")
        return subset

    @classmethod
    def load(cls, path: str | Path) -> "Subset":
        """Reads a file.

        Raises:
          UserError: where it is missing or no subset.
        """
        path = Path(path)
        require(path.is_file(), f"There is no subset file {str(path)!r}.")
        return cls.from_json(path.read_text(), str(path))

    def check(self, config: ModelConfig, model: str = "") -> None:
        """Refuses a subset that is not of this model.

        Args:
          config: of the full model.
          model: its fingerprint; empty: not compared.

        Raises:
          UserError: where the layers, the experts or the fingerprint do not fit, or a layer keeps fewer than C.
        """
        require(
            len(self.experts) == len(config.routed_experts),
            f"The subset has {len(self.experts)} mixture layers, the model {len(config.routed_experts)}: "
            "it was chosen for another model.",
        )
        require(
            not model or model == self.model,
            f"The subset was chosen for the model {self.model}, this is {model}: its experts mean something else. "
            "Choose a subset of this model with emo_jax.select.",
        )
        for layer, (kept, routed) in enumerate(zip(self.experts, config.routed_experts, strict=True)):
            require(
                not kept or (kept[0] >= 0 and kept[-1] < routed),
                f"The subset keeps experts {kept} of mixture layer {layer}, which has only 0..{routed - 1}.",
            )
            require(
                len(kept) >= config.fewest_experts,
                f"The subset keeps {len(kept)} routed experts of mixture layer {layer}; a token chooses "
                f"{config.fewest_experts} (model.top_k without the shared ones).",
            )


def fingerprint(config: ModelConfig, params: Any) -> str:
    """16 hex digits that tell models apart: of the architecture and every router's weights.

    Of a split layer: which neurons its experts have, its norm (which differs between trained models), a learned gate.
    """
    architecture = [config.d_model, config.layer_experts, config.top_k]
    if config.split_layers:
        architecture += [config.split_layers, config.split_experts, config.split_top_k, config.split_gate]
    digest = hashlib.sha256(json.dumps(architecture).encode())
    for path in identifying_leaves(config):
        digest.update(np.ascontiguousarray(jax.device_get(leaf_at(params, path)), np.float32).tobytes())
    return digest.hexdigest()[:16]


def identifying_leaves(config: ModelConfig) -> list[LeafPath]:
    """Paths of the parameters that a fingerprint is made of."""
    paths: list[LeafPath] = []
    for layer, experts in enumerate(config.layer_experts):
        here = ("layers", f"{layer:02d}")
        if experts:
            paths.append((*here, "moe", "router"))
        elif layer in config.split_layers:
            paths.append((*here, "ffn_norm"))
            paths += [] if config.split_copies else [(*here, "ffn", "order")]
            paths += [(*here, "ffn", "gate_experts")] if config.split_gate == "cosine" else []
    return paths


def kept_masks(config: ModelConfig, subset: Subset, *, renormalized: bool = True, ablate: bool = False) -> list[Kept]:
    """The subset as masks for a model's `kept` argument: free, and reversible.

    Args:
      config: of the full model.
      subset: of it.
      renormalized: see `Kept`.
      ablate: keep all but the subset instead.

    Raises:
      UserError: where the subset does not fit, or removing it leaves a layer fewer than C experts.
    """
    subset.check(config)
    masks = []
    for layer, (kept, routed) in enumerate(zip(subset.experts, config.routed_experts, strict=True)):
        mask_R = np.isin(np.arange(routed), kept) != ablate
        require(
            mask_R.sum() >= config.fewest_experts,
            f"Without the subset, mixture layer {layer} has {mask_R.sum()} experts left; a token chooses "
            f"{config.fewest_experts}. Ablate a smaller subset.",
        )
        masks.append(Kept(jnp.asarray(mask_R), jnp.array(renormalized)))
    return masks


def cut(config: ModelConfig, params: Any, subset: Subset) -> tuple[ModelConfig, Any]:
    """The model that holds the kept experts alone: its logits are those of the full model under the subset's masks.

    Returns:
      Its config and parameters; arrays that are not cut are shared with `params`.

    Raises:
      UserError: where the subset does not fit the model.
    """
    subset.check(config, fingerprint(config, params))
    remaining = iter(subset.experts)
    layers = {}
    for (name, layer), experts in zip(sorted(params["layers"].items()), config.layer_experts, strict=True):
        if experts:
            kept = np.array(next(remaining))
            moe = layer["moe"]
            routed = {key: value[kept] for key, value in moe["routed"].items()}
            layer = layer | {"moe": moe | {"routed": routed, "router": moe["router"][:, kept]}}
        layers[name] = layer
    return config.cut(subset.experts), params | {"layers": layers}


def merge_back(
    params: Any,
    subset: Subset,
    cut_params: Any,
    *,
    weight: float = 1.0,
    routers: bool = True,
    shared: bool = True,
    rest: bool = False,
) -> Any:
    """The full model with a cut model's experts put back at their places.

    Args:
      params: of the full model.
      subset: that was cut out of it.
      cut_params: of the cut model, fine-tuned or not.
      weight: 1 replaces; less interpolates, (1 − weight) · full + weight · cut.
      routers: the kept experts' router columns too.
      shared: the shared experts too.
      rest: everything else too: attention, norms, embedding, head, dense layers.

    Returns:
      Parameters of the full model; experts outside the subset are as in `params`.

    Raises:
      UserError: on a weight outside 0..1, or parameters that are not a cut of `params` by `subset`.
    """
    require(0 <= weight <= 1, f"weight={weight} must lie in 0..1: 1 replaces, less interpolates.")

    def mix(full: jax.Array, new: jax.Array) -> jax.Array:
        require(
            full.shape == new.shape,
            f"An array of the cut model has shape {list(new.shape)}, its place {list(full.shape)}: it is not a cut of "
            "this model by this subset.",
        )
        return new.astype(full.dtype) if weight == 1 else (1 - weight) * full + weight * new.astype(full.dtype)

    require(
        params["layers"].keys() == cut_params["layers"].keys(),
        f"The cut model has {len(cut_params['layers'])} layers, the full one {len(params['layers'])}.",
    )
    remaining = iter(subset.experts)
    layers = {}
    for name in sorted(params["layers"]):
        full, new = params["layers"][name], cut_params["layers"][name]
        merged = jax.tree.map(mix, full, new) if rest and "moe" not in full else dict(full)
        if "moe" in full:
            kept = np.array(next(remaining))
            if rest:
                merged |= {key: jax.tree.map(mix, full[key], new[key]) for key in full if key != "moe"}
            moe = dict(full["moe"])
            moe["routed"] = {
                key: value.at[kept].set(mix(value[kept], new["moe"]["routed"][key]))
                for key, value in ((k, jnp.asarray(v)) for k, v in moe["routed"].items())
            }
            if routers:
                router = jnp.asarray(moe["router"])
                moe["router"] = router.at[:, kept].set(mix(router[:, kept], new["moe"]["router"]))
            if shared and "shared" in moe:
                moe["shared"] = jax.tree.map(mix, moe["shared"], new["moe"]["shared"])
            merged["moe"] = moe
        layers[name] = merged
    outside = (
        {key: jax.tree.map(mix, params[key], cut_params[key]) for key in params if key != "layers"} if rest else {}
    )
    return params | outside | {"layers": layers}


def compose(operation: str, subsets: Sequence[Subset]) -> tuple[Subset, list[float]]:
    """Union, intersection, or the first without the others.

    Returns:
      The subset, and for each layer the share of the experts in any of them that is in all of them (1: equal).

    Raises:
      UserError: on an unknown operation, fewer than two subsets, or subsets of different models.
    """
    require_choice("operation", operation, OPERATIONS)
    require(len(subsets) >= 2, f"{operation} needs at least two subsets, found {len(subsets)}.")
    first = subsets[0]
    for other in subsets[1:]:
        require(
            other.model == first.model and len(other.experts) == len(first.experts),
            f"The subsets are of different models, {first.model} and {other.model}.",
        )
    layers = [[set(experts) for experts in layer] for layer in zip(*(s.experts for s in subsets), strict=True)]
    combine = {
        "union": lambda sets: set.union(*sets),
        "intersection": lambda sets: set.intersection(*sets),
        "difference": lambda sets: sets[0].difference(*sets[1:]),
    }[operation]
    experts = tuple(tuple(sorted(combine(sets))) for sets in layers)
    shared = [len(set.intersection(*sets)) / max(len(set.union(*sets)), 1) for sets in layers]
    method = f"{operation}({', '.join(subset.method for subset in subsets)})"
    return Subset(experts, first.model, method, " ".join(sorted({s.data for s in subsets if s.data}))), shared
