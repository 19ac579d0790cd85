"""What would a run take? Its memory, FLOPs, exchanges and time on chips that nobody has yet."""

from emo_jax.planning.compiler import Compiled, compile_step, expected_seconds, unplaced
from emo_jax.planning.cost import Cost, estimate
from emo_jax.planning.report import plan_json, plan_text, search_text
from emo_jax.planning.roofline import REACHED, StepTime, step_time
from emo_jax.planning.search import Layout, Planner
from emo_jax.planning.topology import Topology, parse_topology

__all__ = [
    "REACHED",
    "Compiled",
    "Cost",
    "Layout",
    "Planner",
    "StepTime",
    "Topology",
    "compile_step",
    "estimate",
    "expected_seconds",
    "parse_topology",
    "plan_json",
    "plan_text",
    "search_text",
    "step_time",
    "unplaced",
]
