"""One process of a job that computes nothing: `python -m tests.parallel.member WHAT`, with JAX_… in its environment.

WHAT: `end`; `raise` (process 1 has a mistake, the others wait for it); `crash` (it has a defect); `sleep`; `differ`.
"""

import os
import sys
import time

from emo_jax.errors import UserError
from emo_jax.parallel import processes

processes.LOST_AFTER = 6.0


def main(what: str) -> None:
    index = int(os.environ.get("JAX_PROCESS_ID", "0"))
    with processes.job():
        if what == "differ":
            processes.agree({"same": [1, 2], "colour": "red" if index < 2 else "blue"}, "paint it.")
        if what == "raise" and index == 1:
            raise UserError("no paint on this host; buy some.")
        if what == "crash" and index == 1:
            raise OSError("a bucket leaks")
        print("ready", flush=True)
        if what == "sleep":
            time.sleep(100)
        processes.wait()
    print("ended", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
