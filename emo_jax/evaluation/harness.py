"""Standard benchmarks: a model as EleutherAI's lm-evaluation-harness (`lm_eval`) asks it.

Import it where it is used: it needs the extra `evaluation`, and says so in a `UserError`.

Letters: B rows, S sequence, D model, V vocabulary.
"""

import difflib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.api import Model
from emo_jax.data import encode, load_tokenizer
from emo_jax.errors import UserError, require
from emo_jax.inference import Generator, Sampling, complete
from emo_jax.model import Kept, ModelConfig, bind, token_losses
from emo_jax.model.functional import Parameters

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise UserError(f"Benchmarks need lm_eval ({error}): pip install '.[evaluation]'") from error

SHORTEST = 32
"""Rows are padded to it, a larger power of two, or the maximal length: few shapes, each of which is compiled."""
BOOTSTRAPS = 1000
"""Resamples behind the standard error of a metric that has no formula for it."""


class HarnessModel(LM):
    """What `lm_eval.simple_evaluate` needs of a model, confined to its subset where it has one.

    Raises `UserError` where the model has no tokenizer, and the methods where a text without context meets a model
    without an end-of-text token, which stands before it.
    """

    def __init__(self, model: Model, *, batch_size: int = 8, max_length: int = 1024):
        """For `batch_size` requests at once, of at most `max_length` input tokens each."""
        super().__init__()
        require(batch_size >= 1, f"batch_size={batch_size} must be at least 1.")
        require(max_length >= 1, f"max_length={max_length} must be at least 1.")
        if model.tokenizer is None:
            raise UserError("Benchmarks are texts and the model has no tokenizer.json; put its own in its folder.")
        self.batch_size, self.max_length = batch_size, max_length
        self._end = model.end_of_text_id
        self._tokenizer = load_tokenizer(model.tokenizer, model.end_of_text, model.config.vocab_size)
        self._params, self._kept = model.params, model._kept
        self._losses = jax.jit(functools.partial(_losses, model.config))
        self._generator = Generator(model.config)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each (context, continuation), and whether greedy decoding would continue so.

        Too long contexts lose their beginning.

        Raises:
          UserError: where a continuation alone is longer than `max_length`.
        """
        return self._score([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability in nats of each text, every token counted once.

        Texts longer than `max_length` are cut as the harness cuts them: windows that share one token, the last with
        all the context that fits.
        """
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (tokens,) = encode(self._tokenizer, request.args)
            own = [*map(make_disjoint_window, get_rolling_token_windows(tokens, self._start(), self.max_length, 1))]
            windows += own
            owners += [i] * len(own)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._score(windows), strict=True):
            totals[i] += total
        return totals

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy text after each (context, arguments), up to `until`, the end-of-text token or `max_gen_toks`.

        Too long contexts lose their beginning.

        Raises:
          UserError: where sampling is asked for, or `max_gen_toks` leaves no room for a context.
        """
        starts: list[list[int]] = []
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            context, asked = request.args
            temperature = float(asked.get("temperature", 1 if asked.get("do_sample") else 0))
            require(
                temperature == 0 or asked.get("do_sample") is False,
                f"A task asks for sampling (temperature={temperature}); text is generated greedily only.",
            )
            options = normalize_gen_kwargs(asked)
            limit = options["max_gen_toks"]
            require(
                0 < limit < self.max_length,
                f"A task generates max_gen_toks={limit} tokens; they need 1..{self.max_length - 1} to fit behind a "
                f"context in max_length={self.max_length}.",
            )
            (tokens,) = encode(self._tokenizer, [context])
            starts.append((tokens or [self._start()])[limit - self.max_length :])
            alike.setdefault((tuple(filter(None, options["until"])), limit), []).append(i)
        texts = [""] * len(requests)
        for (until, limit), own in alike.items():
            for batch in self._batches([starts[i] for i in own], "generate_until"):
                places = [own[i] for i in batch]
                rows = [starts[i] for i in places]
                rows += rows[:1] * (self.batch_size - len(rows))  # one shape, one compile
                completions, _ = complete(
                    self._generator,
                    self._params,
                    rows,
                    self._tokenizer,
                    max_new_tokens=limit,
                    sampling=Sampling(),
                    stop=until,
                    end_of_text_id=self._end,
                    kept=self._kept,
                )
                for i, completion in zip(places, completions, strict=False):
                    texts[i] = completion.text
        return texts

    def _start(self) -> int:
        require(self._end >= 0, "A text without context starts with the end-of-text token and the model has none.")
        return self._end

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut by the harness's convention: tokenized as one text, its spaces before a word."""
        given, text = context.rstrip(), context + continuation
        first, whole = encode(self._tokenizer, [given, text])
        if not first:
            return [self._start()], whole
        if len(whole) <= len(first):  # tokens that reach across the border would leave nothing to predict
            return first, encode(self._tokenizer, [text[len(given) :]])[0]
        return first, whole[len(first) :]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of tokens."""
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        require(
            longest <= self.max_length,
            f"A continuation has {longest} tokens, more than max_length={self.max_length}; raise it.",
        )
        rows = [[*context, *continuation][-self.max_length - 1 :] for context, continuation in pairs]
        scores = [(0.0, True)] * len(pairs)
        for places in self._batches(rows, "loglikelihood"):
            tokens_BS, length_B = self._pad([rows[i][:-1] for i in places])
            targets_BS, _ = self._pad([rows[i][1:] for i in places])
            loss_BS, hit_BS = jax.device_get(self._losses(self._params, tokens_BS, length_B, self._kept, targets_BS))
            for b, i in enumerate(places):
                asked = slice(length_B[b] - len(pairs[i][1]), length_B[b])
                scores[i] = (-float(loss_BS[b, asked].sum(dtype=np.float64)), bool(hit_BS[b, asked].all()))
        return scores

    def _batches(self, rows: list[list[int]], name: str) -> Iterator[list[int]]:
        """Places of rows of similar length, the longest first: what fits in memory once, fits to the end."""
        places = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for first in tqdm(range(0, len(rows), self.batch_size), desc=name):
            yield places[first : first + self.batch_size]

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows as int32 [B, S], zeros behind them, and their lengths, int32 [B]; missing rows have length 0."""
        length_B = np.zeros(self.batch_size, np.int32)
        length_B[: len(rows)] = [len(row) for row in rows]
        power = 1 << (int(length_B.max()) - 1).bit_length()
        tokens_BS = np.zeros((self.batch_size, min(max(power, SHORTEST), self.max_length)), np.int32)
        for b, row in enumerate(rows):
            tokens_BS[b, : len(row)] = row
        return tokens_BS, length_B


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    task_path: str = "",
    fewshot: int = -1,
    limit: int = 0,
    batch_size: int = 8,
    max_length: int = 1024,
) -> list[list[Any]]:
    """Evaluates a model on tasks of the harness.

    Args:
      model: with its tokenizer; under `apply_subset`, what it can still do.
      tasks: names of tasks, groups or tags, such as "hellaswag".
      task_path: folder with further tasks as YAML files. Those need no network; the harness's own download theirs.
      fewshot: examples before each question; −1: as many as the task says. Tasks that insist on none get none.
      limit: use the first so many examples of each task; 0: all.
      batch_size, max_length: see `HarnessModel`.

    Returns:
      A table: its head, then a line for each task (or group) and metric: value, standard error ("" where the harness
      gives none) and number of examples.

    Raises:
      UserError: an unknown task, or one that cannot be loaded; and as `HarnessModel`.
    """
    harness_model = HarnessModel(model, batch_size=batch_size, max_length=max_length)
    manager, loaded = _load_tasks(tasks, task_path)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm_eval would bootstrap in forks, where JAX's threads hang
    results = simple_evaluate(
        harness_model,
        tasks=loaded,
        task_manager=manager,
        num_fewshot=fewshot if fewshot >= 0 else None,
        limit=limit or None,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
    )
    table: list[list[Any]] = [["task", "metric", "value", "standard error", "examples"]]
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{kind}", "N/A")
            title = metric if kind == "none" else f"{metric} ({kind})"
            table.append([name, title, float(value), "" if error == "N/A" else float(error), found["sample_len"]])
    return table


def _load_tasks(names: Sequence[str], task_path: str) -> tuple[TaskManager, list[Any]]:
    """The harness's index of tasks, and the tasks and groups themselves with their data."""
    require(bool(names), "There are no tasks to evaluate; name some, such as hellaswag.")
    require(not task_path or Path(task_path).is_dir(), f"task_path={task_path!r} is not a folder.")
    manager = TaskManager(include_path=task_path or None, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # a folder's groups may name tasks of the harness
        manager = TaskManager(include_path=task_path or None)  # reads 14,000 files: ten seconds
    loaded: list[Any] = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UserError(f"There is no task {name!r}. " + (f"Near: {', '.join(near)}." if near else ""))
        try:
            made = manager.load([name])
        except Exception as error:  # whatever a data set's download or a task's own code raises
            raise UserError(f"Task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
        loaded += [made["groups"][name]] if name in made["groups"] else made["tasks"].values()
    return manager, loaded


def _hidden(
    config: ModelConfig, params: Parameters, tokens_BS: jax.Array, length_B: jax.Array, kept: list[Kept] | None
) -> jax.Array:
    place_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
    ids_BS = (place_BS < length_B[:, None]).astype(jnp.int32)
    return bind(config, params)(tokens_BS, ids_BS, place_BS, kept=kept)[0]


def _losses(
    config: ModelConfig,
    params: Parameters,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    kept: list[Kept] | None,
    targets_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `token_losses`; what stands behind a row's length means nothing."""
    hidden_BSD = _hidden(config, params, tokens_BS, length_B, kept)
    return token_losses(*bind(config, params).readout(hidden_BSD), targets_BS)
