"""What a compiler's memory plan says, from a plan small enough to read."""

from emo_jax.planning.buffers import Buffer, part_of, read_assignment, readable

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, page 0, parameter 1, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.1 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 512, page 0, constant:
 value: <2 constant.1 @0> (size=512,offset=0): f32[1]{0:T(128)}
allocation 2: size 5000, page 0, preallocated-temp:
 value: <3 early @0> (size=2000,offset=0): f32[500]{0:T(512)}
 value: <4 same_place @0> (size=2000,offset=0): f32[500]{0:T(512)}
 value: <5 long.1 @0> (size=1000,offset=2000): bf16[500]{0:T(512)(128)(2,1)}
 value: <6 long.2{1} (phi) @0> (size=1000,offset=3000): bf16[500]{0:T(512)(128)(2,1)}
 value: <7 late @0> (size=2000,offset=0): f32[500]{0:T(512)}
allocation 3: size 99999, color 1, page 0, preallocated-temp:
 value: <8 vmem @1> (size=99999,offset=0): f32[1]{0}
"""
LIVE = """HloLiveRange (max 100):
  InstructionSequence:
    0:early
  BufferLiveRange:
    early{}:0-10
    same_place{}:5-20
    long.1{}:8-90
    long.2{1}:18-90
    late{}:95-99
"""
HLO = """
  %long.1 = bf16[500] fusion(%a), metadata={op_name="jit(train_step)/jvp(layer_03)/experts/shard_map/gather"}
  %long.2 = (s32[], bf16[500]) while(%b), metadata={op_name="jit(train_step)/transpose(jvp(layer_00))/experts/gather"}
"""


def test_the_fullest_moment_counts_a_place_once(tmp_path):
    (tmp_path / "a").write_text(ASSIGNMENT)
    (tmp_path / "b").write_text(LIVE)
    found = read_assignment(tmp_path / "a", tmp_path / "b", HLO)
    assert (found.arguments, found.temporaries) == (4096, 5000)
    assert sum(buffer.size for buffer in found.largest) == 4000, "from 18 to 20: one place of 2000, two of 1000"
    assert found.largest[0] == Buffer("other: same_place", "f32[500]", 1, 2000)
    assert {buffer.name for buffer in found.largest[1:]} == {"experts: gather (forward)", "experts: gather (backward)"}


def test_names_tell_the_part_of_the_model_and_the_direction():
    name = "jit(train_step)/transpose(jvp(layer_02))/checkpoint/rematted_computation/attention/dot_general"
    assert readable(name) == "attention: dot_general (computed again)"
    assert part_of("ragged-dot-none.3") == "experts"
    assert part_of("splash_mha_fwd.2") == "attention"
    assert part_of("jit(train_step)/add") == "other"
