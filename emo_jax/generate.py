"""Continues a text: `python -m emo_jax.generate --model=RUN_OR_FOLDER --prompt="Once upon a time"`.

The text appears as it is written, and how fast, at the end. Several prompts are several `--prompt`, or the lines of
`--prompts=FILE`: they advance together and are printed when all are done. `--subset=FILE` reads and uses the subset's
experts alone; `--pool=prompt:32` confines each text to the 32 routed experts that its prompt asks for most.
"""

import sys
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import UserError, require

_MODEL = flags.DEFINE_string("model", None, "Run directory or Hugging Face folder.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to continue; several: a batch.")
_PROMPTS = flags.DEFINE_string("prompts", "", "File with a prompt a line; - for standard input.")
_SUBSET = flags.DEFINE_string("subset", "", "A subset's file: only its experts are read.")
_POOL = flags.DEFINE_string("pool", "none", "none, or prompt:N: the N routed experts that the prompt asks for most.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "At most so many tokens a prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the most likely token, always.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only the so many most likely tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the most likely tokens that together reach this probability.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a completion; may be given several times.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> int:
    """Prints each prompt with what the model writes after it."""
    prompts = [*_PROMPT.value, *_lines(_PROMPTS.value)]
    require(bool(prompts), "--prompt is empty; give a text to continue, or --prompts=FILE.")
    from emo_jax.api import check_generates, load
    from emo_jax.inference import Sampling, pool_size
    from emo_jax.training.weights import saved_model

    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
    if (Path(_MODEL.value) / "config.json").is_file():
        pool_size(_POOL.value, saved_model(Path(_MODEL.value)))  # a mistake is told before a large model is read
    model = load(_MODEL.value, _SUBSET.value or None)
    check_generates(model.config)
    streaming = len(prompts) == 1
    if streaming:
        print(prompts[0], end="", flush=True)

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    completions, speed = model._complete(
        prompts, _TOKENS.value, sampling, _STOP.value, _POOL.value, show if streaming else None
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        print("" if streaming else f"{prompt}{completion.text}\n")
    print(
        f"{speed.prompt_tokens} prompt tokens and the first new one in {speed.first_seconds:.2f} s, compilation "
        f"included; then {_rate(speed.new_tokens, speed.seconds)}.",
        file=sys.stderr,
    )
    return 0


def _lines(path: str) -> list[str]:
    """The prompts of a file."""
    if not path:
        return []
    if path != "-" and not Path(path).is_file():
        raise UserError(f"--prompts={path!r} is not a file; give one with a prompt a line, or - for standard input.")
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens at {tokens / seconds:,.0f} tokens/s" if seconds > 0 and tokens else "nothing to time"


if __name__ == "__main__":
    cli.run(main)
