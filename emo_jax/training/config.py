"""How a run proceeds: steps, optimizer, schedule, evaluation, checkpoints."""

import dataclasses

from emo_jax.errors import require, require_choice

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with gradient clipping and a warmed-up schedule."""

    learning_rate: float = 4e-3
    """Peak of the schedule."""
    schedule: str = "cosine"
    """After the warm-up: `cosine` or `linear` down to `final_fraction`; `wsd` stays at the peak and
    falls linearly over the last `decay_steps`; `constant` stays."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """Length of the final decay of `wsd`."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
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

    def validate(self, steps: int) -> None:
        """Raises `UserError` naming the first field that cannot work in a run of `steps`."""
        require_choice("optimizer.schedule", self.schedule, SCHEDULES)
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive.")
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
        if self.schedule == "wsd":
            require(
                1 <= self.decay_steps <= steps - self.warmup_steps,
                f"optimizer.decay_steps={self.decay_steps} must lie in 1..{steps - self.warmup_steps} "
                "(train.steps less the warm-up) for schedule='wsd'.",
            )


@dataclasses.dataclass
class TrainConfig:
    """The run's length and rhythm, in steps."""

    steps: int = 30_995
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Of the initial weights and of the pool draws."""
    microbatches: int = 1
    """Gradient accumulation: a step's rows go through the model in this many parts."""
    logits_z_weight: float = 1e-5
    """Of the mean squared log-partition of the output logits."""
    log_every: int = 1
    """Steps between lines of `metrics.jsonl`."""
    eval_every: int = 250
    """Steps between held-out evaluations; one always follows the last step. 0: only that one."""
    checkpoint_every: int = 250
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    checkpoints_kept: int = 2
    """Newest checkpoints to keep."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        for name in ("steps", "microbatches", "log_every", "checkpoint_every", "checkpoints_kept"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1.")
        require(self.eval_every >= 0, f"train.eval_every={self.eval_every} is negative; 0 evaluates at the end only.")
        require(self.seed >= 0, f"train.seed={self.seed} is negative.")
        require(self.logits_z_weight >= 0, f"train.logits_z_weight={self.logits_z_weight} is negative.")
