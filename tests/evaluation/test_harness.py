"""Benchmarks through the real lm-evaluation-harness, against the model's own logits, one example at a time.

Letters: S sequence, V vocabulary.
"""

import importlib
import json
import math
import multiprocessing
import random
import re
import socket
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

import emo_jax
from emo_jax.data import train_tokenizer
from emo_jax.errors import UserError
from emo_jax.evaluation import harness
from emo_jax.evaluation.harness import HarnessModel, run_tasks
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.modularity import Subset, fingerprint
from emo_jax.modularity.tables import as_text

LONGEST = 40
CONFIG = ModelConfig(
    vocab_size=300, d_model=16, num_layers=2, num_heads=2, num_experts=8, top_k=3, d_expert=8, dtype="float64"
)
SENTENCE = "the onion simmers in butter while salt and pepper wait; a skipper hauls the sheet as the wind rises"
WORDS = SENTENCE.split()
CHOICES = [
    {"question": f"Question: {' '.join(WORDS[i : i + 3 + 4 * i])}?\nAnswer:", "choices": choices, "answer": answer}
    for i, (choices, answer) in enumerate(
        [
            (["butter", "wind"], 0),
            (["the skipper hauls", "pepper", "a"], 1),
            (["salt and pepper", "the sheet", "ü", "onion"], 2),
            (["in butter", "rises"], 1),
            (["while", "wait;"], 0),
        ]
    )
]
TEXTS = [" ".join((WORDS * 6)[start : start + words]) for start, words in [(0, 9), (3, 1), (5, 90), (2, 14), (7, 51)]]
PROMPTS = [" ".join((WORDS * 6)[start : start + words]) for start, words in [(0, 2), (1, 2), (2, 80), (4, 2), (3, 5)]]
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """Float64, no network, and the harness's caches in a folder of this module's."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a test reached for the network"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([SENTENCE] * 4, CONFIG.vocab_size, "<|end|>").save(str(path))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.7), abstract_parameters(CONFIG))
    params["head"][:, 1:257] *= 0.1  # single bytes seldom win, so that generated texts are readable
    params["head"][:, 0] *= 1.5  # the end-of-text token ends some
    return emo_jax.Model(CONFIG, params, path, 0)


@pytest.fixture(scope="module")
def subset(model):
    return Subset(((0, 2, 5), (1, 3, 4, 6)), fingerprint(model.config, model.params))


class Oracle:
    """What the harness should find, from `model(tokens)` with one row."""

    def __init__(self, model, longest=LONGEST):
        self.model, self.longest = model, longest
        self.tokenizer = Tokenizer.from_file(str(model.tokenizer))

    def ids(self, text):
        return self.tokenizer.encode(text).ids

    def log_probabilities(self, tokens) -> np.ndarray:
        """[S, V]."""
        padded = np.zeros((1, 64), int)  # one shape for all; later tokens change nothing
        padded[0, : len(tokens)] = tokens
        z_SV = np.asarray(self.model(padded))[0, : len(tokens)]
        z_SV = z_SV - z_SV.max(-1, keepdims=True)
        return z_SV - np.log(np.exp(z_SV).sum(-1, keepdims=True))

    def continuation(self, context, continuation):
        """Log-probability and greedy flag."""
        if context:
            encoder = SimpleNamespace(backend="causal", tok_encode=self.ids)
            given, asked = TemplateLM._encode_pair(encoder, context, continuation)
        else:
            given, asked = [0], self.ids(continuation)
        total, greedy = 0.0, True
        tokens = (given + asked)[-self.longest - 1 :]
        log_p_SV = self.log_probabilities(tokens)
        for place in range(len(tokens) - len(asked), len(tokens)):
            total += log_p_SV[place - 1, tokens[place]]
            greedy &= bool(log_p_SV[place - 1].argmax() == tokens[place])
        return total, greedy

    def text(self, text):
        """Log-probability; a token sees its window's tokens before it, the first window begins with end of text."""
        tokens, total = self.ids(text), 0.0
        for start in range(0, len(tokens), self.longest):
            end = min(start + self.longest, len(tokens))
            log_p_SV = self.log_probabilities([0, *tokens][max(end - self.longest, 0) : end])
            total += sum(log_p_SV[place - end, tokens[place]] for place in range(start, end))
        return total

    def generated(self, context, until=(), new=NEW):
        tokens, made = (self.ids(context) or [0])[-(self.longest - new) :], []
        while len(made) < new:
            token = int(self.log_probabilities(tokens + made)[-1].argmax())
            if token == 0:
                break
            made.append(token)
            if any(stop in self.tokenizer.decode(made) for stop in until):
                break
        text = self.tokenizer.decode(made)
        return text[: min([text.find(stop) for stop in until if stop in text], default=None)]


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


@pytest.fixture(scope="module")
def until(oracle):
    """Stop strings, one of which the second prompt's text contains, across tokens."""
    return ["no such text", oracle.generated(PROMPTS[1])[6:9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, oracle, until):
    """Tasks with their data."""
    path = tmp_path_factory.mktemp("tasks")
    gold = [oracle.generated(prompt, until) if i % 2 else "other" for i, prompt in enumerate(PROMPTS)]
    write(
        path,
        "choices",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        fewshot_split="test",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write(
        path,
        "texts",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    write(
        path,
        "prompts",
        [{"prompt": prompt, "gold": text} for prompt, text in zip(PROMPTS, gold, strict=True)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{gold}}",
        generation_kwargs={"until": until, "max_gen_toks": NEW, "do_sample": False},
        filter_list=[{"name": "whole", "filter": [{"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match"}],
    )
    write(
        path,
        "last_words",
        [{"text": text.rsplit(" ", 1)[0], "word": text.rsplit(" ", 1)[1]} for text in TEXTS if " " in text],
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{word}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    return path


def write(path, name, rows, **fields):
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (path / f"{name}.yaml").write_text(yaml.safe_dump(task | {"test_split": "test"} | fields))


def ask(harness_model, kind, *arguments):
    return getattr(harness_model, kind)([Instance(kind, {}, args, i) for i, args in enumerate(arguments)])


@pytest.fixture(scope="module")
def asked(model):
    return HarnessModel(model, batch_size=3, max_length=LONGEST)


def test_every_answer_that_the_harness_gets_is_the_oracles(asked, oracle, folder, until):
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    names = ["choices", "texts", "prompts"]
    samples = simple_evaluate(asked, tasks=names, task_manager=tasks, bootstrap_iters=0)["samples"]
    for document, sample in zip(CHOICES, samples["choices"], strict=True):
        for choice, (pair,) in zip(document["choices"], sample["resps"], strict=True):
            total, greedy = oracle.continuation(document["question"], f" {choice}")
            np.testing.assert_allclose(pair[0], total, rtol=1e-10)
            assert pair[1] == greedy
    for text, sample in zip(TEXTS, samples["texts"], strict=True):
        np.testing.assert_allclose(sample["resps"][0][0], oracle.text(text), rtol=1e-10)
    found = [sample["resps"][0][0] for sample in samples["prompts"]]
    assert found == [oracle.generated(prompt, until) for prompt in PROMPTS]
    assert found[1] and found[1] != oracle.generated(PROMPTS[1])  # a stop string
    assert any(len(oracle.ids(prompt)) > LONGEST - NEW for prompt in PROMPTS)
    assert "" in found and found[3] == oracle.generated(PROMPTS[3], new=2 * NEW) != ""  # end of text


def test_the_table_holds_the_metrics_of_the_oracles_answers(model, oracle, folder, monkeypatch):
    monkeypatch.setattr(multiprocessing, "Pool", lambda *_: pytest.fail("a process with JAX's threads was forked"))
    names = ["choices", "texts", "prompts", "last_words"]
    table = run_tasks(model, names, task_path=str(folder), batch_size=3, max_length=LONGEST)
    assert table[0] == ["task", "metric", "value", "standard error", "examples"]
    found = {tuple(line[:2]): line[2:] for line in table[1:]}
    right, right_normed = [], []
    for document in CHOICES:
        totals = [oracle.continuation(document["question"], f" {choice}")[0] for choice in document["choices"]]
        sizes = [len(choice) for choice in document["choices"]]
        right.append(np.argmax(totals) == document["answer"])
        right_normed.append(np.argmax(np.divide(totals, sizes)) == document["answer"])
    error = np.std(right, ddof=1) / math.sqrt(len(right))
    np.testing.assert_allclose(found["choices", "acc"], [np.mean(right), error, 5], rtol=1e-10)
    np.testing.assert_allclose(found["choices", "acc_norm"][0], np.mean(right_normed))
    nats = -sum(map(oracle.text, TEXTS))
    sizes, words = (
        sum(len(part) for part in parts) for parts in zip(*((t.encode(), t.split()) for t in TEXTS), strict=True)
    )
    assert found["texts", "bits_per_byte"][1:] == ["", len(TEXTS)]
    for metric, value in [
        ("bits_per_byte", nats / sizes / math.log(2)),
        ("byte_perplexity", math.exp(nats / sizes)),
        ("word_perplexity", math.exp(nats / words)),
    ]:
        np.testing.assert_allclose(found["texts", metric][0], value, rtol=1e-9)
    assert found["prompts", "exact_match (whole)"][0] == 2 / 5
    words = [text.rsplit(" ", 1) for text in TEXTS if " " in text]
    totals = [oracle.continuation(context, f" {word}")[0] for context, word in words]
    value, error, examples = found["last_words", "perplexity"]
    np.testing.assert_allclose(value, math.exp(-np.mean(totals)), rtol=1e-9)
    draws = random.Random(0)  # the harness's seed of its first thousand resamples
    resampled = [math.exp(-np.mean(draws.choices(totals, k=len(totals)))) for _ in range(1000)]
    np.testing.assert_allclose([error, examples], [np.std(resampled, ddof=1), len(totals)], rtol=1e-8)
    assert re.search(r"texts +bits_per_byte +[\d.]+ +5\n", as_text(table))


@pytest.mark.parametrize("renormalized", [True, False])
def test_a_subsets_answers_are_those_of_the_confined_model(model, oracle, subset, renormalized):
    confined = model.apply_subset(subset, renormalized=renormalized)
    harness_model, its_oracle = HarnessModel(confined, batch_size=3, max_length=LONGEST), Oracle(confined)
    pairs = [(document["question"], " salt") for document in CHOICES[:2]]
    found = ask(harness_model, "loglikelihood", *pairs)
    np.testing.assert_allclose(
        [total for total, _ in found], [its_oracle.continuation(*pair)[0] for pair in pairs], rtol=1e-10
    )
    full = np.array([oracle.continuation(*pair)[0] for pair in pairs])
    assert np.abs(full - [total for total, _ in found]).min() > 1e-3
    made = ask(harness_model, "generate_until", *((prompt, {"max_gen_toks": NEW}) for prompt in PROMPTS[:2]))
    assert made == [its_oracle.generated(prompt) for prompt in PROMPTS[:2]]
    assert made != [oracle.generated(prompt) for prompt in PROMPTS[:2]]


def test_greedy_is_said_of_what_greedy_decoding_gives(asked, oracle):
    pairs = [(prompt, oracle.generated(prompt, new=new)) for prompt in PROMPTS for new in (1, 2)]
    pairs = [pair for pair in pairs if pair[1]] + [(prompt, text + "ü") for prompt, text in pairs]
    found = [greedy for _, greedy in ask(asked, "loglikelihood", *pairs)]
    assert found == [oracle.continuation(*pair)[1] for pair in pairs]
    assert set(found) == {True, False}


def test_spaces_borders_and_empty_contexts_are_tokenized_as_the_harness_does(asked, oracle):
    pairs = [("the onion ", "simmers"), ("the onion", " simmers"), ("the\n", "\nwind"), ("", "wind rises"), ("a", " ü")]
    found = ask(asked, "loglikelihood", *pairs, ("", ""), ("butter", ""), (" ", "wind"))
    np.testing.assert_allclose(
        [total for total, _ in found[:5]], [oracle.continuation(*pair)[0] for pair in pairs], rtol=1e-10
    )
    assert found[0] == found[1] and found[5:7] == [(0, True), (0, True)]
    np.testing.assert_allclose(found[7][0], oracle.continuation("", " wind")[0], rtol=1e-10)


def test_a_continuation_that_merges_into_the_contexts_last_token_is_still_predicted(asked, oracle):
    context, continuation = "the onio", "n"
    assert len(oracle.ids(context + continuation)) < len(oracle.ids(context))
    found = ask(asked, "loglikelihood", (context, continuation))[0][0]
    log_p_SV = oracle.log_probabilities(oracle.ids(context))
    np.testing.assert_allclose(found, log_p_SV[-1, oracle.ids(continuation)[0]], rtol=1e-10)


def test_too_long_contexts_lose_their_beginning(asked, oracle):
    context = " ".join(WORDS * 5)
    found = ask(asked, "loglikelihood", (context, " wind rises"), ("butter " + context, " wind rises"))
    assert len(oracle.ids(context)) > LONGEST and found[0] == found[1]
    np.testing.assert_allclose(found[0][0], oracle.continuation(context, " wind rises")[0], rtol=1e-10)


def test_batches_change_no_answer(model, asked):
    single = HarnessModel(model, batch_size=1, max_length=LONGEST)
    pairs = [(document["question"], f" {choice}") for document in CHOICES for choice in document["choices"]]
    for kind, arguments in [("loglikelihood", pairs), ("loglikelihood_rolling", [(text,) for text in TEXTS])]:
        np.testing.assert_allclose(ask(single, kind, *arguments), ask(asked, kind, *arguments), rtol=1e-12)
    options = [{"until": "e", "max_gen_toks": 3}, {"max_gen_toks": NEW}, {"until": ["s", "o"], "max_gen_toks": 5}]
    prompts = [(prompt, options[i % 3]) for i, prompt in enumerate([*PROMPTS, ""])]
    assert ask(single, "generate_until", *prompts) == ask(asked, "generate_until", *prompts)


def test_few_shapes_are_compiled(model, monkeypatch):
    traced = []

    def token_losses(hidden_BSD, head_DV, targets_BS):
        traced.append(hidden_BSD.shape)
        return hidden_BSD[..., 0], targets_BS > 0

    monkeypatch.setattr(harness, "token_losses", token_losses)
    harness_model = HarnessModel(model, batch_size=2, max_length=LONGEST)
    ask(harness_model, "loglikelihood", *((" ".join(WORDS * 2)[:size], " wind") for size in range(1, 160, 3)))
    assert traced == [(2, LONGEST, CONFIG.d_model), (2, 32, CONFIG.d_model)]


def test_groups_examples_before_the_question_and_a_limit(model, folder, monkeypatch):
    group = {"group": "all_choices", "task": ["choices"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "all_choices.yaml").write_text(yaml.safe_dump(group))
    seen, index = [], TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: index)  # a group would read the harness's own index too

    def loglikelihood(self, requests):
        seen.extend(request.args[0] for request in requests)
        return [(-1.0, False)] * len(requests)

    monkeypatch.setattr(HarnessModel, "loglikelihood", loglikelihood)
    table = run_tasks(model, ["all_choices"], task_path=str(folder), fewshot=2, limit=3)
    keys = [("choices", "acc"), ("choices", "acc_norm"), ("all_choices", "acc")]
    assert [(*line[:2], line[4]) for line in table[1:]] == [(*key, 3) for key in keys]
    assert table[1][2:] == table[3][2:]
    assert {context.count("Question:") for context in seen} == {3}
    seen.clear()
    run_tasks(model, ["choices"], task_path=str(folder))
    assert {context.count("Question:") for context in seen} == {1}


def test_mistakes_are_told_in_words(model, asked, folder, tmp_path):
    long = " ".join(WORDS * 4)
    for kind, arguments, words in [
        ("loglikelihood", ("a", long), r"has \d+ tokens, more than max_length=40"),
        ("generate_until", ("a", {"do_sample": True, "temperature": 0.7}), "sampling.*greedily only"),
        ("generate_until", ("a", {"do_sample": True}), "greedily only"),
        ("generate_until", ("a", {"max_gen_toks": 40}), "max_gen_toks=40 tokens; they need 1..39"),
    ]:
        with pytest.raises(UserError, match=words):
            ask(asked, kind, arguments)
    for options, words in [({"batch_size": 0}, "batch_size=0"), ({"max_length": 0}, "max_length=0")]:
        with pytest.raises(UserError, match=words):
            HarnessModel(model, **options)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        HarnessModel(emo_jax.Model(CONFIG, model.params))
    endless = HarnessModel(emo_jax.Model(CONFIG, model.params, model.tokenizer))
    contextless = {"loglikelihood": ("", "a"), "loglikelihood_rolling": ("a",), "generate_until": ("", {})}
    for kind, arguments in contextless.items():
        with pytest.raises(UserError, match="the model has none"):
            ask(endless, kind, arguments)
    write(tmp_path, "lost", [], output_type="multiple_choice")
    (tmp_path / "lost.jsonl").unlink()
    for names, path, words in [
        ([], folder, "no tasks"),
        (["choices"], folder / "nowhere", "nowhere' is not a folder"),
        (["lost"], tmp_path, "Task 'lost' cannot be loaded: FileNotFoundError"),
        (["choices", "hellaswagg"], folder, r"no task 'hellaswagg'\. Near: hellaswag"),
    ]:
        with pytest.raises(UserError, match=words):
            run_tasks(model, names, task_path=str(path))


def test_without_the_harness_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "emo_jax.evaluation.harness")
    with pytest.raises(UserError, match=r"pip install '\.\[evaluation\]'"):
        importlib.import_module("emo_jax.evaluation.harness")
