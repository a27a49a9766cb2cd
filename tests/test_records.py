"""Pairs and groups: which lines are read, which are refused, and what becomes of them."""

import functools
import json
import re

import numpy as np
import pytest

from conftest import make_config
from data import prepare_nlregex, prepare_pairs
from nanojepa import batches, corpora
from nanojepa.batches import PairData
from nanojepa.corpora import Tree
from nanojepa.examples import ExampleSet
from nanojepa.readers import open_dataset
from nanojepa.records import (
    Record,
    parse,
    read_dataset,
    read_examples,
    seen_in_train,
    split_examples,
)
from nanojepa.shards import read_shard
from nanojepa.tokenizer import saved_encoding


def pair(text, code, system="s"):
    return Record(0, "pairs", system, [text, code]).to_json()


def group(*texts):
    return {"paraphrases": list(texts)}


def words(count):
    """Pairs of different texts."""
    animals = ("dog", "cat", "cow", "hen")
    return [
        pair(f"a {animals[i % 4]} {i // 4}", f"({animals[i % 4]}){{{i}}}") for i in range(count)
    ]


def json_file(path, *lines):
    """A file of these lines: text as it is, everything else as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


# ---- lines

GOOD = pair("aé b", "[ab]", "translate")
HALF_A_PAIR = (
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}'
)


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "no JSON object"),
        ('{"message": []}', "its columns .*message.* are neither messages nor"),
        ({"messages": GOOD["messages"][:2]}, "roles .*: there must be one user"),
        ({"messages": GOOD["messages"][::2]}, "roles .*: there must be one user"),
        (
            {"messages": GOOD["messages"] + GOOD["messages"][1:]},
            "roles .*: there must be one user and",
        ),
        (pair("x", " \n"), "assistant is empty"),
        (pair("", "x"), "user is empty"),
        (pair(3, "x"), "user is not a text"),
        (HALF_A_PAIR, "half a surrogate pair"),
        (group("alone"), "a group needs at least two texts"),
        ({"paraphrases": "text"}, "a group needs at least two texts"),
        (group("a", ""), r"paraphrases\[1\] is empty"),
    ],
)
def test_a_bad_line_stops_or_is_skipped_by_name(tmp_path, capsys, line, reason):
    good = group("a", "b") if "paraphrases" in str(line) else GOOD
    path = json_file(tmp_path / "x.jsonl", good, "", line, good)
    place = f"{re.escape(path)}, line 3"
    with pytest.raises(ValueError, match=rf"^{place}: .*{reason}.*--bad skip$"):
        read_examples(path)
    assert [record.line for record in read_examples(path, "skip")] == [1, 4]
    said = capsys.readouterr().err
    assert re.search(rf"{place}: skipped: .*{reason}", said) and "1 of 3 lines skipped" in said


def test_invalid_utf8_mixed_kinds_and_nothing_left(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"paraphrases": ["a", "\xff"]}\n')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_examples(path)
    with pytest.raises(ValueError, match="holds no usable line"):
        read_examples(path, "skip")
    json_file(path, GOOD, group("a", "b"))
    with pytest.raises(ValueError, match="line 2: paraphrases among lines of the other kind"):
        read_examples(path)
    assert [record.kind for record in read_examples(path, limit=1)] == ["pairs"]


def test_a_record_is_the_line_it_was_read_from():
    for line in (GOOD, pair("a", "b", None), pair("a", "b", ""), group("a", "b", "c")):
        assert parse(7, line).to_json() == line and parse(7, line).line == 7


def test_a_view_is_known_if_it_stands_on_its_side_of_train():
    train = [["a", "1"], ["b", "2"]]
    test = [["a", "b"], ["1", "2"]]
    assert seen_in_train(train, test, "pairs") == [[True, False], [False, True]]
    assert seen_in_train(train, test, "groups") == [[True, True], [True, True]]


def test_a_split_keeps_copies_on_one_side():
    records = [Record(n, "pairs", None, [f"text {n % 40}", f"code {n}"]) for n in range(80)]
    train, test = split_examples(records, 0.1)
    assert len(test) == 8 and len(train) == 72
    assert not {r.views[0] for r in train} & {r.views[0] for r in test}
    with pytest.raises(ValueError, match="fewer than two different texts.*give --test"):
        split_examples(records[:1] * 2, 0.1)


# ---- data/prepare_pairs.py


def texts_of(folder, split):
    """The examples of a split, decoded from its shard."""
    meta = json.loads((folder / "meta.json").read_text())
    encoding, shard = saved_encoding(folder, meta), read_shard(folder / f"pairs_{split}_000000.bin")
    marks, paired = (meta["doc_token"], meta["separator"]), meta["kind"] == "pairs"
    examples = ExampleSet([shard], *marks, split, paired)
    return [[encoding.decode(view) for view in examples.views(e)] for e in range(len(examples))]


def prepare(folder, train, test, *flags):
    """What the script makes of these lines: its meta.json, and the training examples."""
    train = json_file(folder.with_name(f"{folder.name}-train.jsonl"), *train)
    test = json_file(folder.with_name(f"{folder.name}-test.jsonl"), *test)
    files = ["--train", train, "--test", test, "--out", str(folder)]
    prepare_pairs.main([*files, "--vocab-size", "270", *flags])
    return json.loads((folder / "meta.json").read_text()), texts_of(folder, "train")


def test_what_is_written_is_what_was_read_and_overlaps_are_counted(tmp_path, capsys):
    train = [pair("one é", "1"), pair("two", "2"), pair("three\n", "3"), pair("two", "22")]
    test = [pair("two", "x"), pair("four", "1"), pair("one é", "2"), pair("five", "5")]
    meta, examples = prepare(tmp_path / "out", train, test)
    assert examples == [["one é", "1"], ["two", "2"], ["three\n", "3"], ["two", "22"]]
    assert meta["overlap"] == {"examples": 4, "texts": 2, "codes": 2, "clean": 1}
    assert "4 pairs to train on, 4 to test on, of which 1 are clean" in capsys.readouterr().out
    assert meta["vocab_size"] == meta["doc_token"] + 12
    assert meta["bytes_per_token"][meta["doc_token"] :] == [0] * 12
    groups = [{**group("a", "b", "c"), "code": "x"}]
    meta, examples = prepare(tmp_path / "groups", groups, [group("c", "d"), group("e", "f")])
    assert examples == [["a", "b", "c"]] and meta["kind"] == "groups"
    assert meta["overlap"] == {"examples": 2, "clean": 1}
    with pytest.raises(SystemExit, match="^error: .*out exists: remove it"):
        prepare(tmp_path / "out", train, test)
    with pytest.raises(SystemExit, match="^error: .*different kinds"):
        prepare(tmp_path / "mixed", train, [group("a", "b")])


@pytest.mark.parametrize(
    "system, flags, first",
    [
        ("s", [], "t"),  # one that never changes says nothing
        ("another", [], "s\nt"),
        ("s", ["--system", "keep"], "s\nt"),
        ("another", ["--system", "drop"], "t"),
    ],
)
def test_a_system_message_is_kept_if_it_says_something(tmp_path, system, flags, first):
    lines = [pair("t", "c"), pair("u", "d", system)]
    assert prepare(tmp_path / "out", lines, lines, *flags)[1][0] == [first, "c"]


def test_hugging_face_datasets_by_columns_and_groups(tmp_path):
    """A local dataset through the real loading code."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [
        {"q": f"question {i}", "a": f"answer {i}", "texts": [f"x{i}", f"y{i}", f"z{i}"]}
        for i in range(20)
    ]
    json_file(folder / "train.jsonl", *rows)

    def make(name, *flags):
        out = tmp_path / name
        place = ["--dataset", str(folder), "--out", str(out), "--vocab-size", "260"]
        prepare_pairs.main([*place, *flags])
        return texts_of(out, "train"), texts_of(out, "val")

    train, test = make("pairs", "--columns", "q", "a")
    assert sorted(train + test) == sorted([row["q"], row["a"]] for row in rows) and len(test) == 1
    records = read_examples(tmp_path / "pairs" / "test.jsonl")  # for evaluate.py
    assert [record.views for record in records] == test
    assert make("lists", "--group", "texts")[0][0] in [row["texts"] for row in rows]
    assert make("columns", "--group", "q", "a")[0][0] in [[row["q"], row["a"]] for row in rows]
    for flags, message in (
        (["--columns", "q", "b"], "no column b among 'q', 'a', 'texts'"),
        ([], "its columns .*'q', 'a', 'texts'.* are neither messages"),
        (["--group", "q"], "line 1: paraphrases: a group needs at least two texts"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            make("none", *flags)


def test_a_dataset_with_a_column_of_messages(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    json_file(folder / "train.jsonl", *words(6))
    dataset = open_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    records = read_dataset(dataset, "place", limit=4)
    assert [r.views for r in records] == [parse(0, line).views for line in words(4)]
    with pytest.raises(ValueError, match="no/such: neither a file nor a dataset.*check its name"):
        open_dataset("no/such")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "one of the arguments --train --dataset is required"),
        (["--train", "x", "--dataset", "y"], "--dataset: not allowed with argument --train"),
        (["--train", "x", "--tokenizer", "gpt2", "--vocab-size", "300"], "not allowed with"),
        (["--train", "x", "--columns", "a", "b", "--group", "c"], "not allowed with"),
        (["--train", "x", "--test-fraction", "2"], "--test-fraction 2.0: must lie between 0 and 1"),
        (["--train", "/nowhere.jsonl"], "error: /nowhere.jsonl: neither a file nor a dataset"),
    ],
)
def test_misuse_of_prepare_pairs(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        prepare_pairs.main(["--out", str(tmp_path / "o"), *flags])
    assert message in f"{error.value} {capsys.readouterr().err}"


# ---- data/prepare_nlregex.py


def test_generated_sentences_and_expressions_are_distinct_and_seeded():
    examples = corpora.generate(400, 3, seed=5)
    assert examples == corpora.generate(400, 3, seed=5) != corpora.generate(400, 3, seed=6)
    texts = [text for wordings, _ in examples for text in wordings]
    assert len(set(texts)) == 1200 and len({regex for _, regex in examples}) == 400
    for wordings, regex in examples:
        assert regex.count("(") == regex.count(")")
        assert not re.search(r"\{[xyn]\}", regex + "".join(wordings))


def test_an_expression_means_what_its_sentence_says():
    """Without & and ~ it is Python's too: a dog or a ring, before a digit."""
    either = Tree("({x})|({y})", 2, [Tree("dog"), Tree("ring")])
    before = Tree("({x}).*({y})", 2, [either, Tree("[0-9]")]).regex()
    assert re.match(before, "dog and 7") and re.match(before, "ring 7")
    assert not re.match(before, "dog") and not re.match(before, "7 and dog")
    whole = Tree("\\b({x})\\b", 2, [either]).regex()
    assert re.search(whole, "a ring")
    assert not re.search(whole, "a ringer") and not re.search(whole, "adog")


def test_a_grammar_that_is_too_small_says_so(monkeypatch):
    monkeypatch.setattr(corpora, "draw_tree", lambda rng, depth: Tree("[0-9]"))
    with pytest.raises(ValueError, match="the grammar has no 20 sentences of 1 wordings; ask for"):
        corpora.generate(20, 1, 1)


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_nlregex_prepares_disjoint_splits_and_the_test_file(tmp_path, capsys, kind):
    flags = ["--kind", kind, "--train", "200", "--test", "40", "--out"]
    for name in ("once", "again"):
        prepare_nlregex.main([*flags, str(tmp_path / name)])
    assert f"200 {kind} to train on, 40 to test on" in capsys.readouterr().out
    meta = json.loads((tmp_path / "once" / "meta.json").read_text())
    assert meta["overlap"]["clean"] == 40 and meta["kind"] == kind
    assert len(read_examples(tmp_path / "once" / "test.jsonl")) == 40
    assert meta == json.loads((tmp_path / "again" / "meta.json").read_text())
    with pytest.raises(SystemExit, match="^error: --train and --test must be at least 1"):
        prepare_nlregex.main(["--train", "0"])


def test_the_embedded_pairs_are_prepared_if_they_are_missing(tmp_path, monkeypatch):
    small = functools.partial(corpora.prepare_nlregex, train=60, test=20)
    monkeypatch.setattr(batches, "ROOT", tmp_path)
    monkeypatch.setitem(corpora.EMBEDDED, "data/nlregex", small)
    monkeypatch.setitem(
        corpora.EMBEDDED, "data/nlregex_groups", functools.partial(small, kind="groups")
    )
    for name, views in (("data/nlregex", 2), ("data/nlregex_groups", 3)):
        cfg = make_config(name, train_seq_len=128, jepa_objective="pair", jepa_lambda=0.1)
        data = batches.open_data(cfg)
        assert isinstance(data, PairData) and len(data.sets["train"]) == 60
        assert np.all(data.sets["train"].counts() == views)
        assert (tmp_path / name / "test.jsonl").exists()
