"""Where a run's files lie: in one folder, or in a bucket with a local folder for those that are appended to."""

import contextlib
import fcntl
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from emo_jax.errors import UserError, require
from emo_jax.parallel import processes

_APPENDED = ("metrics.jsonl", "wandb_id")
"""What a run that continues elsewhere must have again."""
_SENT = (*_APPENDED, "report.html", "tensorboard", "profile")


class RunDirectory:
    """A run directory: a folder that all processes see, or `gs://BUCKET/NAME`.

    Attributes:
      home: config, tokenizer and checkpoints: what all processes read, and a run continues from.
      local: log, events, report, profile, tokens. `home` itself, or this host's folder for a run in a bucket, from
        where process 0 sends them (`send`).
    """

    def __init__(self, name: str | os.PathLike[str]):
        """Touches nothing.

        Raises:
          UserError: where the name is an address that is not supported.
        """
        scheme, separator, rest = os.fspath(name).partition("://")
        self.in_bucket = bool(separator)
        self.home: Path | epath.Path
        if self.in_bucket:
            require(scheme == "gs", f"--workdir={name}: a run lies in a folder or in gs://BUCKET/NAME.")
            require(bool(rest.strip("/").partition("/")[2]), f"--workdir={name} needs a name behind its bucket.")
            require(
                importlib.util.find_spec("gcsfs") is not None,
                f"--workdir={name} needs the package gcsfs: pip install 'emo_jax[gcs]', or mount the bucket.",
            )
            self.home = epath.Path(os.fspath(name).rstrip("/"))
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self.local = cache / "emo_jax" / "runs" / rest.strip("/")
        else:
            self.home = self.local = Path(name).absolute()
        self._holder = ""
        self._sent: dict[Path, tuple[int, int]] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the run for this job, through process 0.

        The system lets go of a folder however the process ends. Of a bucket nothing can: there the newest job has the
        run, and the one before learns it when it is about to save (`send`).

        Raises:
          UserError: where another job holds the folder, or the processes do not see the same one.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        self._holder = f"process {os.getpid()} on {platform.node()}, {time.time_ns()}"
        lock = self.home / ".lock"
        with contextlib.ExitStack() as opened:
            if processes.first() and self.in_bucket:
                lock.write_text(self._holder)
            elif processes.first():
                file = opened.enter_context((self.local / ".lock").open("a+"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    file.seek(0)
                    raise UserError(
                        f"Another process ({file.read().split(',')[0] or 'unknown'}) is training in {self.home}; "
                        "wait for it, stop it, or use another --workdir."
                    ) from None
                file.truncate(0)
                file.write(self._holder)
                file.flush()
            processes.wait()
            seen = lock.read_text() if lock.exists() else ""
            processes.agree({"the lock in --workdir": seen}, "give a folder that all hosts share.")
            yield

    def fetch(self) -> None:
        """Brings here what a run in a bucket goes on from, and nothing of a run that was here under its name."""
        if not self.in_bucket:
            return
        for name in _SENT:
            shutil.rmtree(self.local / name, ignore_errors=True)
            (self.local / name).unlink(missing_ok=True)
        for name in (*_APPENDED, "config.json"):
            if (self.home / name).exists():
                (self.local / name).write_bytes((self.home / name).read_bytes())

    def send(self) -> None:
        """Sends what is new here to a run in a bucket; process 0 calls it before each checkpoint.

        Raises:
          UserError: where another job has taken the run over.
        """
        if not self.in_bucket:
            return
        holder = (self.home / ".lock").read_text()
        require(
            holder == self._holder,
            f"Another job ({holder.partition(',')[0]}) has begun to train in {self.home}. This one ends and saves "
            "nothing more.",
        )
        for name in _SENT:
            place = self.local / name
            for file in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
                version = (file.stat().st_size, file.stat().st_mtime_ns)
                if self._sent.get(file) != version:
                    target = self.home / file.relative_to(self.local).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
                    self._sent[file] = version
