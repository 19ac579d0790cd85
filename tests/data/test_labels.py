"""Texts with labels, from JSON lines to batches: where the loss stands, and on what side of the split a text is."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from emo_jax.data import (
    DataConfig,
    Example,
    build_store,
    count_train_rows,
    domain_batches,
    examples_by_domain,
    first_documents,
    heldout_batches,
    is_heldout,
    labelled_batches,
    load_tokenizer,
    prepare_store,
    read_examples,
    train_batches,
)
from emo_jax.errors import UserError

LABELS = ("no", "maybe", "yes")
LENGTH = 24


def write_examples(path, count=120):
    rng = random.Random(3)
    lines = []
    for number in range(count):
        words = rng.choices(["cat", "moss", "search", "flint", "oak"], k=rng.randint(1, 24))
        line = {"text": f"{number} {' '.join(words)}", "label": rng.choice(LABELS), "domain": rng.choice("de")}
        if number % 2:
            line["text_pair"] = " ".join(rng.choices(["oak", "search"], k=rng.randint(1, 24)))
        lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.fixture(params=["encoder", "decoder"])
def kind(request):
    return request.param


@pytest.fixture
def written(tmp_path):
    return tmp_path / "task.jsonl", write_examples(tmp_path / "task.jsonl")


@pytest.fixture
def labelled(kind, written, store, wordpiece):
    """How an encoder, or a decoder, reads the examples."""
    encoder = kind == "encoder"
    return DataConfig(
        source="examples",
        path=str(written[0]),
        labels=LABELS,
        label_at="first" if encoder else "last",
        special_tokens=encoder,
        tokenizer=str(wordpiece if encoder else store.tokenizer_path),
        end_of_text="" if encoder else "<|endoftext|>",
        packing="best_fit",
        heldout_fraction=0.3,
        sequence_length=LENGTH,
        batch_size=4,
        max_document_bytes=16,  # which does not cut texts with labels
    )


def expected(lines, config):
    """What a text becomes: (tokens, types, label), by the tokenizer itself; a list of them, sorted."""
    tokenizer = Tokenizer.from_file(config.tokenizer)
    tokenizer.enable_truncation(config.sequence_length, strategy="longest_first")
    made = []
    for line in lines:
        texts = [line["text"], line["text_pair"]] if "text_pair" in line else [line["text"]]
        encoding = tokenizer.encode(*texts, add_special_tokens=config.special_tokens)
        types = encoding.type_ids if config.special_tokens else None
        made.append((encoding.ids, types, config.labels.index(line["label"])))
    return sorted(made, key=repr)


def found(batches, config):
    """Like `expected`, of batches, where every text must have one loss, at its first or last token."""
    made = []
    for batch in batches:
        assert ("token_types" in batch) == config.special_tokens
        for b, ids_S in enumerate(batch["document_ids"]):
            assert not batch["loss_mask"][b][ids_S == 0].any()
            for g in range(1, ids_S.max() + 1):
                of = ids_S == g
                np.testing.assert_array_equal(batch["positions"][b, of], np.arange(of.sum()))
                read = 0 if config.label_at == "first" else of.sum() - 1
                assert np.flatnonzero(batch["loss_mask"][b, of]).tolist() == [read]
                types = batch["token_types"][b, of].tolist() if config.special_tokens else None
                made.append((batch["tokens"][b, of].tolist(), types, int(batch["targets"][b, of][read])))
    return sorted(made, key=repr)


def sides(lines, fraction):
    held = [is_heldout(line["text"] + line.get("text_pair", ""), fraction) for line in lines]
    return [[line for line, own in zip(lines, held, strict=True) if own == side] for side in (False, True)]


def test_training_and_heldout_batches_have_each_text_whole_or_cut_with_its_label(labelled, written, tmp_path):
    log = []
    made = prepare_store(labelled, 400, tmp_path / "store", log.append)
    train, heldout = sides(written[1], labelled.heldout_fraction)
    assert found(heldout_batches(made, labelled, 4), labelled) == expected(heldout, labelled)
    for split, lines in ((made.train, train), (made.heldout, heldout)):
        by_domain = domain_batches(first_documents(split, made.domains), made.domains, labelled, 4)
        for name, batches in by_domain.items():
            assert found(batches, labelled) == expected([line for line in lines if line["domain"] == name], labelled)
    rows = count_train_rows(made, labelled)
    epoch = list(itertools.islice(iter(train_batches(made, labelled)), -(-rows // labelled.batch_size)))
    once = {name: np.concatenate([batch[name] for batch in epoch])[:rows] for name in epoch[0]}
    assert found([once], labelled) == expected(train, labelled)
    longer = dataclasses.replace(labelled, sequence_length=10_000)
    cut = sum(len(tokens) > LENGTH for tokens, _, _ in expected(train, longer))
    assert f"train: {cut} documents are cut to data.sequence_length={LENGTH} tokens." in log
    assert cut > 5


def test_resumed_training_goes_on_at_the_next_batch(labelled, tmp_path):
    made = prepare_store(labelled, 400, tmp_path / "store")
    whole = list(itertools.islice(iter(train_batches(made, labelled)), 9))
    iterator = iter(train_batches(made, labelled))
    for _ in range(4):
        next(iterator)
    resumed = iter(train_batches(prepare_store(labelled, 400, tmp_path / "store"), labelled))
    resumed.set_state(iterator.get_state())
    for batch, other in zip(whole[4:], resumed, strict=False):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_equal_texts_with_other_labels_or_pairs_are_kept_and_on_one_side(labelled, tmp_path):
    lines = []
    for number in range(60):
        text, pair = f"number {number} ", "cat moss"
        lines += [{"text": text, "text_pair": pair, "label": label} for label in ("no", "yes", "no")]
        lines.append({"text": text + pair, "label": "no"})
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = build_store(dataclasses.replace(labelled, heldout_documents=999), 400, tmp_path / "store")
    assert made.manifest["duplicates_dropped"] == 60
    assert len(made.train) + len(made.heldout) == 180
    kept = [line for n, line in enumerate(lines) if n % 4 != 2]
    for split, own in zip((made.train, made.heldout), sides(kept, 0.3), strict=True):
        bounds = itertools.pairwise(split.offsets.tolist())
        tokens = [(split.tokens[a:b].tolist(), int(label)) for (a, b), label in zip(bounds, split.labels, strict=True)]
        assert sorted(tokens) == sorted((ids, label) for ids, _, label in expected(own, labelled))
        assert len(own) % 3 == 0 and own


def test_settings_that_shape_the_tokens_of_labelled_texts_must_agree(labelled, tmp_path):
    made = prepare_store(labelled, 400, tmp_path / "store")
    again = dataclasses.replace(labelled, label_at="last", batch_size=2, max_documents=3)
    assert prepare_store(again, 400, tmp_path / "store").fingerprint == made.fingerprint
    for change, words in (
        (
            {"labels": LABELS[::-1]},
            r"data\.labels=\['no', 'maybe', 'yes'\], this run asks for \['yes', 'maybe', 'no'\]",
        ),
        ({"labels": ()}, r"data\.labels=\['no', 'maybe', 'yes'\], this run asks for \[\]"),
        ({"sequence_length": 48}, r"data\.sequence_length=24, this run asks for 48"),
        ({"special_tokens": not labelled.special_tokens}, r"data\.special_tokens="),
    ):
        with pytest.raises(UserError, match=words):
            prepare_store(dataclasses.replace(labelled, **change), 400, tmp_path / "store")
    whole = dataclasses.replace(labelled, sequence_length=1000)  # where no text was cut, and none would be, any will do
    uncut = prepare_store(whole, 400, tmp_path / "uncut")
    assert LENGTH < uncut.longest < 1000
    fits = dataclasses.replace(labelled, sequence_length=uncut.longest)
    assert prepare_store(fits, 400, tmp_path / "uncut").fingerprint == uncut.fingerprint
    assert build_store(fits, 400, tmp_path / "exact").fingerprint == uncut.fingerprint
    for asked, name in ((uncut.longest - 1, "uncut"), (1000, "exact")):
        with pytest.raises(UserError, match=rf"data\.sequence_length=\d+, this run asks for {asked}"):
            prepare_store(dataclasses.replace(labelled, sequence_length=asked), 400, tmp_path / name)
    other = build_store(dataclasses.replace(labelled, labels=LABELS[::-1]), 400, tmp_path / "other")
    assert other.fingerprint != made.fingerprint


def test_a_store_of_labelled_texts_is_not_packed_so_that_it_cuts_them(labelled, tmp_path):
    made = prepare_store(labelled, 400, tmp_path / "store")
    for change in ({"sequence_length": LENGTH - 1}, {"packing": "concatenate"}):
        for read in (train_batches, lambda made, config: heldout_batches(made, config, 4)):
            with pytest.raises(UserError, match=r"would cut texts with labels, of up to 24 tokens"):
                read(made, dataclasses.replace(labelled, **change))


def test_labelled_batches_are_those_of_a_store_and_say_whose_each_token_is(labelled, written, kind):
    path, lines = written
    tokenizer = load_tokenizer(labelled.tokenizer, labelled.end_of_text, 400)
    end = tokenizer.token_to_id(labelled.end_of_text) if labelled.end_of_text else -1
    shape = {"sequence_length": LENGTH, "batch_size": 4}
    reading = {"label_at": labelled.label_at, "special_tokens": labelled.special_tokens}
    examples = read_examples(str(path), labels=LABELS)
    assert [example.label for example in examples] == [LABELS.index(line["label"]) for line in lines]
    batches = labelled_batches(examples, tokenizer, **reading, **shape)
    assert found(batches, labelled) == expected(lines, labelled)
    unknown = [Example(line["text"], line.get("text_pair", ""), "text") for line in lines]
    seen = []
    for batch, other in zip(batches, labelled_batches(unknown, tokenizer, **reading, **shape), strict=True):
        assert not other["targets"].any()
        for name in batch.keys() - {"targets"}:
            np.testing.assert_array_equal(batch[name], other[name])
        assert ((batch["examples"] >= 0) == (batch["document_ids"] > 0)).all()
        for index in batch["examples"][batch["loss_mask"]]:
            b, s = np.nonzero(batch["examples"] == index)
            tokens = batch["tokens"][b, s].tolist()
            assert [tokens] == [ids for ids, _, _ in expected(lines[index : index + 1], labelled)]
            seen.append(index)
    assert sorted(seen) == list(range(len(lines)))
    by_domain, sizes = examples_by_domain(
        str(path), labelled.tokenizer, end, labels=LABELS, documents=7, **reading, **shape
    )
    assert sorted(by_domain) == ["d", "e"]
    for name, batches in by_domain.items():
        own = [line for line in lines if line["domain"] == name][:7]
        assert found(batches, labelled) == expected(own, labelled)
        assert sizes[name] == sum(len(line["text"] + line.get("text_pair", "")) for line in own)
