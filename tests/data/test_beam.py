import fcntl

import pytest
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

from emo_jax.data.beam import pipeline_options
from emo_jax.data.config import PrepareConfig
from emo_jax.data.preparation import prepare
from emo_jax.errors import UserError


@pytest.mark.parametrize(
    ("flags", "workers", "message"),
    [
        (["--max_charcters=3"], 1, "There is no flag --max_charcters, .* Did you mean --max_characters?"),
        (["--direct_num_wrkers=3"], 1, "Did you mean --direct_num_workers?"),
        (["stray"], 1, "unexpected argument 'stray'"),
        (["--direct_num_workers=3", "stray"], 1, "unexpected argument 'stray'"),
        ([], 0, "--workers=0 must be at least 1"),
        (["--runner=DataflowRunner"], 2, "--workers=2 is for this machine; DataflowRunner has flags of its own"),
        (["--direct_num_workers=3"], 2, "--workers=2 is --direct_num_workers, as processes; drop"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, workers, message):
    with pytest.raises(UserError, match=message):
        pipeline_options(flags, workers, ["max_characters", "workers"])


def test_flags_of_beam_reach_it():
    options = pipeline_options(["--runner=FlinkRunner", "--direct_num_workers", "3"], 1)
    assert options.view_as(StandardOptions).runner.endswith("FlinkRunner")
    assert options.view_as(DirectOptions).direct_num_workers == 3
    assert pipeline_options([], 4).view_as(DirectOptions).direct_num_workers == 4


def test_one_folder_is_prepared_by_one_process_at_a_time(corpus, tmp_path):
    config = PrepareConfig(path=str(corpus), out=str(tmp_path / "out"), vocab_size=300)
    with (tmp_path / ".out.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"Another process is preparing .*out; wait for it, stop it, or give"):
            prepare(config)
    assert prepare(config)["train"]["documents"] > 100
