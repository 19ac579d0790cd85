"""Alarms: silent in health, raised once with what, where, since and what helps, ended, and the same on resume."""

import json
import math

import numpy as np
import pytest

from emo_jax.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig
from emo_jax.training import train
from emo_jax.training.alarms import COLLAPSE, DEAD, LOGITS, OVERLOAD, SKIPS, SPIKES, WINDOW, Alarms, message

WARMUP = 10


def config(**data) -> Config:
    return Config(
        model=ModelConfig(num_layers=3, experts_per_layer=(32, 0, 32), d_dense=8, top_k=5),
        data=DataConfig(**{"batch_size": 16, "sequence_length": 256} | data),
        optimizer=OptimizerConfig(warmup_steps=WARMUP),
    )


def healthy(step, rng):
    """A line as healthy runs log them."""
    return {
        "step": step,
        "grad_norm": float(np.exp(rng.normal(0, 0.25))),
        "skipped_in_row": int(rng.random() < 0.01),
        "routing": {
            "dead_experts": [int(rng.random() < 0.1), 0],
            "load_max_over_mean": [2 + rng.random(), 1.5 + rng.random()],
            "router_z": [(math.log(31) + rng.normal(0, 0.5)) ** 2 for _ in range(2)],
            "token_entropy": [0.5 * math.log(31), 0.9 * math.log(31)],
        },
    }


def break_(line, name):
    routing = line["routing"]
    if name == DEAD.name:
        routing["dead_experts"][1] = 3
    elif name == OVERLOAD.name:
        routing["load_max_over_mean"][1] = 9.0
    elif name == LOGITS.name:
        routing["router_z"][1] = 400.0
    elif name == COLLAPSE.name:
        routing["token_entropy"][1] = 0.01 * math.log(31)
    elif name == SPIKES.name and line["step"] % 8 == 0:
        line["grad_norm"] = 30.0
    elif name == SKIPS.name and line["step"] % 4 == 0:
        line["skipped_in_row"] = 1


def lines(steps, name="", start=0, stop=0):
    rng = np.random.default_rng(0)
    made = [healthy(step, rng) for step in range(1, steps + 1)]
    for line in made[start:stop]:
        break_(line, name)
    return made


def test_a_healthy_run_and_an_uneven_warm_up_raise_nothing():
    alarms = Alarms(config())
    for line in lines(3000, OVERLOAD.name, 0, WARMUP):
        assert alarms.update(line) == []


@pytest.mark.parametrize("rule", [DEAD, OVERLOAD, LOGITS, COLLAPSE, SPIKES, SKIPS], ids=lambda rule: rule.name)
def test_a_sickness_is_told_once_with_place_and_remedy_and_so_is_its_end(rule):
    alarms, told = Alarms(config()), []
    for line in lines(1500, rule.name, 400, 800):
        told += [(line["step"], event) for event in alarms.update(line)]
    assert [event["event"] for _, event in told] == ["raised", "cleared"]
    (raised, event), (cleared, end) = told
    assert event["name"] == end["name"] == rule.name
    assert event["layer"] == (2 if rule in (DEAD, OVERLOAD, LOGITS, COLLAPSE) else -1)  # layer 1 is dense
    assert 400 < raised <= 400 + WINDOW and 800 < cleared <= 800 + WINDOW + 8
    assert event["since"] == end["since"] == raised - WINDOW + 1
    text = message(event)
    assert rule.name in text and f"since step {event['since']}" in text and rule.helps in text
    assert "{" not in text
    assert "alarm ended" in message(end)


def test_what_is_told_depends_on_the_lines_alone_so_a_resumed_run_agrees():
    made = lines(900, DEAD.name, 300, 600)
    whole, resumed = Alarms(config()), Alarms(config())
    told = [whole.update(line) for line in made]
    for line in made[:450]:
        resumed.update(line)
    assert [resumed.update(line) for line in made[450:]] == told[450:]


def test_experts_without_tokens_are_no_news_where_a_step_has_few_tokens():
    alarms = Alarms(config(batch_size=1, sequence_length=64))
    for line in lines(600, DEAD.name, 0, 600):
        assert alarms.update(line) == []


def test_numbers_that_are_not_finite_count_as_spikes_and_break_nothing():
    alarms, told = Alarms(config()), []
    for line in lines(300):
        if line["step"] > 150:
            line["grad_norm"], line["routing"]["router_z"] = math.nan, [math.nan, math.inf]
        told += alarms.update(line)
    assert [event["name"] for event in told] == [SPIKES.name]


def test_a_run_without_balance_tells_so_in_its_log_metrics_and_report(tmp_path, capsys):
    rng = np.random.default_rng(0)
    words = ["simmer", "onions", "butter", "keel", "wind", "party", "shall"]
    texts = [" ".join(rng.choice(words, 20)) for _ in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sick = Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, num_heads=2, num_experts=16, top_k=3, d_expert=8, dtype="float32"
        ),
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(weight=0.0, router_z_weight=0.0),
        data=DataConfig(source="jsonl", path=str(tmp_path / "texts.jsonl"), sequence_length=64, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=0.03, schedule="constant", warmup_steps=2, weight_decay=0.0),
        train=TrainConfig(steps=140, eval_every=0, checkpoint_every=140, guard_window=0),
    )
    train(sick, tmp_path / "run", log=lambda text: None)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    raised = {event["name"]: line["step"] for line in logged for event in line.get("alarms", ())}
    assert {DEAD.name, OVERLOAD.name} & set(raised)
    name, step = next(iter(raised.items()))
    assert f"step {step}: ALARM: {name}" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert name in page and "raise balance.weight" in page
