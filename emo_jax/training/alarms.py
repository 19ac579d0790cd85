"""Is the router still healthy? What goes wrong slowly, noticed in the logged metrics: what, since when, what helps."""

import collections
import dataclasses
import math
from typing import Any

from emo_jax.config import Config

WINDOW = 100
"""Logged steps after the warm-up that a judgement rests on; a run shorter than that raises nothing."""

CLEARED = 0.9
"""An alarm ends when its measure is below this share of its limit, so that it does not flicker."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a measure is an alarm.

    Attributes:
      name: of the alarm.
      limit: from which value of the measure on.
      seen: what to say of a value, with {value} and {limit}.
      helps: what to try.
    """

    name: str
    limit: float
    seen: str
    helps: str


# Limits: healthy runs of the tiny configs stay below 3.6 times the mean load, 0.7 of a logit and 3 % of skips.
DEAD = Rule(
    "unused experts",
    1.0,
    "{value:.0f} or more experts without a token at every step",
    "raise balance.weight, lower optimizer.learning_rate, or widen pools (pool.min, pool.max)",
)
OVERLOAD = Rule(
    "overloaded expert",
    5.0,
    "the busiest expert has {value:.1f} times the mean load",
    "raise balance.weight; check that balance.scope is not local",
)
LOGITS = Rule(
    "router logits grow",
    15.0,
    "their log-partition is {value:.1f} from that of equal logits",
    "raise balance.router_z_weight or lower optimizer.learning_rate",
)
COLLAPSE = Rule(
    "routing entropy collapses",
    0.95,
    "a token's routing has {entropy:.1%} of the entropy of an even choice",
    "raise balance.router_z_weight and balance.weight, or lower optimizer.learning_rate",
)
SPIKES = Rule(
    "gradient spikes",
    0.05,
    "{value:.0%} of steps have a gradient norm over 5 times the median",
    "lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at the data of these steps",
)
SKIPS = Rule(
    "skipped steps",
    0.1,
    "{value:.0%} of steps were skipped",
    "lower optimizer.learning_rate, or raise train.guard_sigmas where the steps are healthy",
)


class Alarms:
    """A run's alarms: a function of its logged lines alone, so a resumed run that reads them again agrees.

    Attributes:
      active: (name, layer) of each alarm that has not ended; layer −1 for the whole model.
    """

    def __init__(self, config: Config):
        """For a run with this config."""
        model = config.model
        self._routed = model.routed_experts
        self._warmup = config.optimizer.warmup_steps
        self._layers = model.routing_layers
        tokens = config.data.batch_size * config.data.sequence_length
        # With few tokens an expert, some have none by chance.
        self._few = [tokens * model.num_choices / routed < 50 for routed in self._routed]
        self._lines: collections.deque[dict[str, Any]] = collections.deque(maxlen=WINDOW)
        self.active: dict[tuple[str, int], int] = {}

    def update(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """What the line of a step changes.

        Args:
          line: as in `metrics.jsonl`.

        Returns:
          One dict an alarm that begins or ends: `event` ("raised" or "cleared"), `name`, `layer` (−1: all), `since`
          (the first step of the window it was seen in), and for those that begin `seen` and `helps`.
        """
        if line["step"] <= self._warmup:  # an untrained router is uneven
            return []
        self._lines.append(line)
        if len(self._lines) < WINDOW:
            return []
        events = self._judge(SPIKES, -1, self._spikes()) + self._judge(SKIPS, -1, self._skips())
        for i, layer in enumerate(self._layers):
            log_r = math.log(max(self._routed[i], 2))
            if not self._few[i]:
                dead = [line["routing"]["dead_experts"][i] for line in self._lines]
                always = sum(dead) / WINDOW if self.active.get((DEAD.name, layer)) else min(dead)
                events += self._judge(DEAD, layer, always)
                events += self._judge(OVERLOAD, layer, self._mean("load_max_over_mean", i))
            events += self._judge(LOGITS, layer, abs(math.sqrt(self._mean("router_z", i)) - log_r))
            entropy = self._mean("token_entropy", i) / log_r
            events += self._judge(COLLAPSE, layer, 1 - entropy, entropy=entropy)
        return events

    def _judge(self, rule: Rule, layer: int, value: float, **seen: float) -> list[dict[str, Any]]:
        key = (rule.name, layer)
        if key not in self.active and value >= rule.limit:
            self.active[key] = self._lines[0]["step"]
            text = rule.seen.format(value=value, **seen)
            about = {"event": "raised", "name": rule.name, "layer": layer, "since": self.active[key]}
            return [about | {"seen": text, "helps": rule.helps}]
        if key in self.active and value < CLEARED * rule.limit:
            return [{"event": "cleared", "name": rule.name, "layer": layer, "since": self.active.pop(key)}]
        return []

    def _mean(self, metric: str, i: int) -> float:
        values = [line["routing"][metric][i] for line in self._lines]
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else 0.0

    def _spikes(self) -> float:
        norms = [line["grad_norm"] for line in self._lines]
        median = sorted(norms, key=lambda norm: norm if math.isfinite(norm) else math.inf)[WINDOW // 2]
        return sum(not norm <= 5 * median for norm in norms) / WINDOW

    def _skips(self) -> float:
        return sum(line.get("skipped_in_row", 0) > 0 for line in self._lines) / WINDOW


def message(event: dict[str, Any]) -> str:
    """An event in one sentence, for a log."""
    where = f" in layer {event['layer']}" if event["layer"] >= 0 else ""
    if event["event"] == "cleared":
        return f"alarm ended: {event['name']}{where}"
    return f"ALARM: {event['name']}{where}, since step {event['since']}: {event['seen']}. What helps: {event['helps']}."
