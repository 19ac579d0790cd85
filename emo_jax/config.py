"""What is a run? One dataclass that a config file fills, flags override and a run directory keeps."""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_jax.data.config import DataConfig
from emo_jax.errors import UserError, require, require_choice
from emo_jax.model.config import BalanceConfig, ModelConfig, PoolConfig
from emo_jax.parallel.config import MeshConfig

SCHEDULES = ("cosine", "linear", "constant")
LORA_TARGETS = {"attention": ("query", "key", "value", "out"), "ffn": ("gate", "up", "down")}
"""Parameters that LoRA may factor, by the module of a layer; of feed-forwards dense and split ones, not mixtures."""


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with gradient clipping and a warmed-up schedule."""

    learning_rate: float = 4e-3
    """Peak of the schedule."""
    schedule: str = "cosine"
    """After the warm-up: `cosine` or `linear` down to `final_fraction`, or `constant`."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Learning rate at the schedule's end, as a fraction of the peak."""
    anneal_steps: int = 0
    """The run's last so many steps fall linearly to 0 from where the schedule, which ends before them, has come.
    A run that has finished may be lengthened by them: raise `train.steps` by as many."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of its running square."""
    epsilon: float = 1e-8
    """Added to the root of the running square."""
    weight_decay: float = 0.1
    """Decoupled decay of every parameter but the embedding."""
    clip_norm: float = 1.0
    """Global norm that gradients are scaled down to."""
    trainable_experts: tuple[str, ...] = ()
    """Routed experts of each mixture layer, as in `'0 5 7'`: only they, with their router columns, are trained, and
    everything else stays as it is. Empty: everything is trained."""
    lora_rank: int = 0
    """Rank r of the changes that LoRA (arXiv 2106.09685) trains of `lora_targets`, with a classifier's head and the
    learned gates of split layers, while everything else stays as it is. 0: no LoRA."""
    lora_alpha: float = 16.0
    """α: a change is α / r times the product of its two factors."""
    lora_targets: tuple[str, ...] = ("query", "value")
    """Parameters whose change is factored, in every layer that has them: `query`, `key`, `value`, `out` of attention;
    `gate`, `up`, `down` of dense or split feed-forwards."""

    def validate(self, steps: int) -> None:
        """Raises `UserError` naming the first field that cannot work in a run of `steps`."""
        require_choice("optimizer.schedule", self.schedule, SCHEDULES)
        require(
            0 < self.learning_rate < float("inf"),
            f"optimizer.learning_rate={self.learning_rate} must be positive and finite.",
        )
        require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive.")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} is negative.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).")
        require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon} must be positive.")
        require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction} must lie in [0, 1].")
        require(
            0 <= self.warmup_steps < steps or self.warmup_steps == 0,
            f"optimizer.warmup_steps={self.warmup_steps} must lie in 0..train.steps-1={steps - 1}; "
            "shorten the warm-up or lengthen the run.",
        )
        require(
            0 <= self.anneal_steps <= steps - self.warmup_steps,
            f"optimizer.anneal_steps={self.anneal_steps} must lie in 0..{steps - self.warmup_steps} "
            "(train.steps less the warm-up).",
        )
        require(self.lora_rank >= 0, f"optimizer.lora_rank={self.lora_rank} is negative; 0 trains without LoRA.")
        require(
            0 < self.lora_alpha < float("inf"),
            f"optimizer.lora_alpha={self.lora_alpha} must be positive and finite.",
        )
        for name in self.lora_targets:
            require(
                "," not in name,
                f"optimizer.lora_targets has {name!r}; several are written as "
                "--config.optimizer.lora_targets=\"('query','value')\".",
            )
            require_choice("optimizer.lora_targets", name, [name for names in LORA_TARGETS.values() for name in names])
        if self.lora_rank:
            require(
                bool(self.lora_targets),
                f"optimizer.lora_targets is empty with optimizer.lora_rank={self.lora_rank}; name what is to be "
                "trained, or set lora_rank=0.",
            )
            require(
                not self.trainable_experts,
                f"optimizer.lora_rank={self.lora_rank} and optimizer.trainable_experts={self.trainable_experts!r} are "
                "two answers to what is trained; drop one.",
            )


@dataclasses.dataclass
class TrainConfig:
    """The run's length and rhythm, in steps."""

    steps: int = 30_995
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Of the initial weights and of the pool draws."""
    init_from: str = ""
    """A run directory or a Hugging Face folder whose weights the run starts from, with a fresh optimizer and fresh
    data; its tokenizer too, where `data.tokenizer` is empty."""
    keep_experts: tuple[str, ...] = ()
    """Routed experts of each mixture layer of `init_from`, as in `'0 5 7'`, which the model is cut to; empty: all."""
    new_experts: int = 0
    """Fresh routed experts that each mixture layer of `init_from` gets behind its own."""
    continue_from: str = ""
    """A run directory whose newest checkpoint the run goes on from: weights, optimizer, place in the data and step.
    Only what acts later may differ: an anneal, pools from a later step on."""
    continue_step: int = 0
    """The checkpoint of `continue_from`; 0: its newest."""
    microbatches: int = 1
    """Gradient accumulation: a step's rows go through the model in this many parts."""
    logits_z_weight: float = 1e-5
    """Of the mean squared log-partition of the output logits."""
    guard_window: int = 128
    """Steps whose loss or gradient norm lies far above those of the last so many are skipped; 0: only those
    that are not finite."""
    guard_sigmas: float = 6.0
    """How far: standard deviations above the window's mean."""
    guard_patience: int = 20
    """Skipped steps in a row after which the run stops."""
    log_every: int = 1
    """Steps between lines of `metrics.jsonl`."""
    eval_every: int = 250
    """Steps between held-out evaluations; one always follows the last step. 0: only that one."""
    checkpoint_every: int = 250
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    checkpoints_kept: int = 2
    """Newest checkpoints to keep."""
    wandb_project: str = ""
    """A Weights & Biases project that metrics go to as well; empty: none."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        for name in ("steps", "microbatches", "guard_patience", "log_every", "checkpoint_every", "checkpoints_kept"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1.")
        require(
            not (self.init_from and self.continue_from),
            "train.init_from and train.continue_from are both set: a run starts either from weights or from another "
            "run's state; drop one.",
        )
        require(
            bool(self.init_from) or not (self.keep_experts or self.new_experts),
            f"train.keep_experts={self.keep_experts!r} and train.new_experts={self.new_experts} change the model of "
            "train.init_from, which is empty; name a run or a Hugging Face folder there.",
        )
        require(self.new_experts >= 0, f"train.new_experts={self.new_experts} is negative.")
        require(
            self.continue_step >= 0 and (self.continue_step == 0 or bool(self.continue_from)),
            f"train.continue_step={self.continue_step} names a checkpoint of train.continue_from, which is "
            f"{self.continue_from!r}.",
        )
        require(self.eval_every >= 0, f"train.eval_every={self.eval_every} is negative; 0 evaluates at the end only.")
        require(
            0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in 0..2^32-1, the seeds that JAX tells apart."
        )
        require(
            self.guard_window == 0 or self.guard_window >= 8,
            f"train.guard_window={self.guard_window} is too short to know what is usual; set 8 or more, or 0.",
        )
        require(self.guard_sigmas > 0, f"train.guard_sigmas={self.guard_sigmas} must be positive.")
        require(self.logits_z_weight >= 0, f"train.logits_z_weight={self.logits_z_weight} is negative.")


@dataclasses.dataclass
class Config:
    """A run. Fields are never None: a switch is a `kind`, absence is 0 or an empty string."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> None:
        """Checks every field and their combinations.

        Raises:
          UserError: naming the field, its value and what would work.
        """
        self.model.validate()
        self.pool.validate(self.model)
        self.balance.validate()
        self.data.validate()
        self.train.validate()
        self.optimizer.validate(self.train.steps)
        self.mesh.validate()
        self._validate_lora()
        trained = expert_lists("optimizer.trainable_experts", self.optimizer.trainable_experts)
        layers = len(self.model.routed_experts)
        require(
            len(trained) in (0, layers),
            f"optimizer.trainable_experts has {len(trained)} entries for {layers} mixture layers; give one a layer, or "
            "none at all.",
        )
        for layer, (experts, routed) in enumerate(zip(trained, self.model.routed_experts, strict=False)):
            require(
                all(expert < routed for expert in experts),
                f"optimizer.trainable_experts has {self.optimizer.trainable_experts[layer]!r} for mixture layer "
                f"{layer}, whose routed experts are 0..{routed - 1}.",
            )
        require(
            all(trained),
            f"optimizer.trainable_experts={self.optimizer.trainable_experts!r} names no expert of a layer; name one of "
            "each, or leave the field empty.",
        )
        require(
            self.pool.kind == "none" or self.pool.start_step < self.train.steps,
            f"pool.start_step={self.pool.start_step} must lie before train.steps={self.train.steps}, or no step has "
            "a pool; lengthen the run, start them earlier, or set pool.kind=none.",
        )
        self._validate_texts()
        rows, parts = self.data.batch_size, self.train.microbatches
        require(
            rows % parts == 0,
            f"train.microbatches={parts} must divide data.batch_size={rows}.",
        )
        if self.balance.scope == "local":
            require(
                (rows // parts) % self.balance.local_rows == 0,
                f"balance.local_rows={self.balance.local_rows} must divide the {rows // parts} rows of a microbatch.",
            )

    def _validate_lora(self) -> None:
        """Refuses LoRA targets that this model lacks, or whose matrix is smaller than the rank."""
        rank = self.optimizer.lora_rank
        if not rank:
            return
        shapes = _factorable(self.model)
        for target in self.optimizer.lora_targets:
            found = {path: shape for path, shape in shapes.items() if path.endswith(f"/{target}")}
            there = sorted({path.rpartition("/")[2] for path in shapes})
            require(
                bool(found),
                f"optimizer.lora_targets has {target!r}, which no layer of this model has outside of its mixtures; it "
                f"has {', '.join(there)}.",
            )
            for path, (rows, columns) in found.items():
                require(
                    rank <= min(rows, columns),
                    f"optimizer.lora_rank={rank} is more than the smaller side of {path}, a matrix of {rows} by "
                    f"{columns}; set it to at most {min(rows, columns)}, or train everything (lora_rank=0).",
                )
        require(
            not self.train.new_experts,
            f"train.new_experts={self.train.new_experts} with optimizer.lora_rank={rank}: LoRA does not train fresh "
            "experts, and untrained they add nothing; drop one.",
        )

    def _validate_texts(self) -> None:
        """That the model can read, and be trained on, what the data are."""
        model, data = self.model, self.data
        require(
            model.positions == "rotary" or data.sequence_length <= model.max_positions,
            f"data.sequence_length={data.sequence_length} is more than the {model.max_positions} positions that the "
            f"model has learnt (model.max_positions); set --config.data.sequence_length={model.max_positions} or less.",
        )
        require(
            data.labels == model.labels,
            f"data.labels={data.labels!r} and model.labels={model.labels!r} must be the same.",
        )
        require(
            model.causal or bool(model.labels),
            "An encoder (model.causal=False) sees what it would have to predict: it is trained on texts with labels "
            "(model.labels), see emo_jax.finetune.",
        )
        require(
            not (self.optimizer.trainable_experts and model.split_layers),
            "optimizer.trainable_experts names experts of mixtures; those of a split model (model.split_layers) are "
            "trained together.",
        )

    def tokenizer(self) -> str:
        """Path of the tokenizer that the run's tokens are made with; empty: one is trained."""
        if self.train.init_from and not self.data.tokenizer:
            return str(Path(self.train.init_from) / "tokenizer.json")
        return self.data.tokenizer

    def fields(self) -> dict[str, Any]:
        """Every field by its dotted name, such as `model.num_experts`."""
        sections = dataclasses.asdict(self).items()
        return {f"{section}.{name}": value for section, values in sections for name, value in values.items()}

    def to_json(self) -> str:
        """The config as indented JSON, fields in the order of their definition."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The inverse of `to_json`.

        Raises:
          UserError: on text that is no config, a value of the wrong type, or a field this version does not
            know, with the nearest name.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"The config is not JSON: {error}.") from None
        return _from_dict(cls, values, "")


def expert_lists(name: str, lists: Sequence[str]) -> list[tuple[int, ...]]:
    """The numbers of each entry of a field such as `train.keep_experts`, ascending.

    Raises:
      UserError: naming the field, where an entry is anything else than numbers.
    """
    for text in lists:
        require(
            all(part.isdecimal() for part in text.split()),
            f"{name} has {text!r}; an entry holds the numbers of a layer's routed experts, as in '0 5 7'.",
        )
    return [tuple(sorted({int(part) for part in text.split()})) for text in lists]


def _factorable(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every parameter that LoRA may factor, by its path, as a matrix: the axes that a product sums over by the rest."""
    d, sizes = model.d_model, {"query": model.num_heads, "key": model.kv_heads, "value": model.kv_heads}
    shapes: dict[str, tuple[int, int]] = {}
    for layer, experts in enumerate(model.layer_experts):
        own = {f"attention/{name}": (d, heads * model.head_dim) for name, heads in sizes.items()}
        own["attention/out"] = (model.num_heads * model.head_dim, d)
        if not experts:
            hidden, gated = model.feed_forward_width(layer), model.feed_forward == "swiglu"
            own |= {f"ffn/{name}": (d, hidden) for name in (("gate", "up") if gated else ("up",))}
            own["ffn/down"] = (hidden, d)
        shapes |= {f"layers/{layer:02d}/{name}": shape for name, shape in own.items()}
    return shapes


def _from_dict(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    require(isinstance(values, dict), f"The config's {prefix.rstrip('.') or 'top level'} is {values!r}, not an object.")
    defaults = cls()
    kwargs = {}
    for name, value in values.items():
        if not hasattr(defaults, name):
            raise UserError(unknown_field_message(prefix + name))
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            value = _from_dict(type(default), value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        require(
            type(value) is type(default),
            f"The config has {prefix}{name}={value!r}; it must be of type {type(default).__name__}.",
        )
        kwargs[name] = value
    return cls(**kwargs)


def field_names() -> list[str]:
    """Dotted names of every field of a run's config, such as `model.num_experts`."""
    return list(Config().fields())


def unknown_field_message(name: str) -> str:
    """What to tell someone who set a field that does not exist; `name` is dotted, without `config.`."""
    names = field_names()
    section, _, field = name.rpartition(".")
    inside = {full.rpartition(".")[2]: full for full in names if full.rpartition(".")[0] == section}
    near = [inside[match] for match in difflib.get_close_matches(field, inside, n=1)]
    near = near or [full for full in names if full.rpartition(".")[2] == field][:1]  # right field, wrong section
    near = near or ([] if inside else difflib.get_close_matches(name, names, n=1))
    hint = f" Did you mean --config.{near[0]}?" if near else " See emo_jax/config.py for the fields."
    return f"There is no config field {name!r}.{hint}"
