"""A worker process of Beam's local runner that says only what went wrong: `python -m emo_jax.data.worker`.

`emo_jax.data.beam` starts it in place of Beam's own, which tells every step of its start on the terminal.
"""

import logging
import signal
import sys

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, with which its workers end
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
