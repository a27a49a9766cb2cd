"""data/pairs.py, data/nlregex.py and evaluate.py: what is read, what is refused, and that a run answers what it was trained on."""
import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch

import evaluate
import loader
import train_gpt
from conftest import ROOT, TINY, run_cli
from data import nlregex, pairs
from data.shards import read_shard, saved_encoding

PAIR = {"messages": [{"role": "system", "content": "translate"}, {"role": "user", "content": "a\u00e9 b"}, {"role": "assistant", "content": "[ab]"}]}


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def pair(text, code, system="s"):
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}, {"role": "assistant", "content": code}]}


def words(n):
    return [pair(f"lines with a {w} {i}", f"({w}){{{i}}}") for i in range(n // 4) for w in ("dog", "cat", "cow", "hen")]


# ---- data/pairs.py


@pytest.mark.parametrize("line, reason", [
    ('{"messages": [', "not JSON"), ("[" * 100_000, "not JSON"), ('"text"', 'neither {"messages"'), ('{"message": []}', 'neither {"messages"'),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message of role assistant"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}, "no message of role user"),
    ({"messages": PAIR["messages"] + PAIR["messages"][1:]}, "only one user and one assistant"),
    (pair("x", " \n"), "assistant is empty"), (pair("", "x"), "user is empty"), (pair(3, "x"), "user is not a text"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "half a surrogate pair"),
    ({"paraphrases": ["alone"]}, "a group needs at least two texts"), ({"paraphrases": "text"}, "a group needs at least two texts"),
    ({"paraphrases": ["a", ""]}, r"paraphrases\[1\] is empty")])
def test_a_bad_line_stops_or_is_skipped_by_name(tmp_path, capsys, line, reason):
    good = {"paraphrases": ["a", "b"]} if "paraphrases" in str(line) else PAIR
    path = write_lines(tmp_path / "x.jsonl", good, "", line, good)
    with pytest.raises(SystemExit, match=rf"error: {re.escape(path)}, line 3: .*{reason}.*--bad skip") as e:
        pairs.read_jsonl(path)
    assert "\n" not in str(e.value)
    assert [n for n, *_ in pairs.read_jsonl(path, "skip")] == [1, 4]
    said = capsys.readouterr().err
    assert re.search(rf"{re.escape(path)}, line 3: skipped: .*{reason}", said) and "1 of 3 lines skipped" in said


def test_invalid_utf8_a_missing_file_mixed_kinds_and_nothing_left(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"paraphrases": ["a", "\xff"]}\n')
    with pytest.raises(SystemExit, match="line 1: not JSON"):
        pairs.read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(SystemExit, match="holds no usable line"):
        pairs.read_jsonl(tmp_path / "x.jsonl", "skip")
    with pytest.raises(SystemExit, match="nowhere.jsonl: No such file"):
        pairs.read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(SystemExit, match="line 2: paraphrases among lines of the other kind"):
        pairs.read_jsonl(write_lines(tmp_path / "y.jsonl", PAIR, {"paraphrases": ["a", "b"]}))


def prepare(tmp_path, train, test, *flags, out="out"):
    a, b = write_lines(tmp_path / f"{out}-train.jsonl", *train), write_lines(tmp_path / f"{out}-test.jsonl", *test)
    pairs.main(["--train", a, "--test", b, "--out", str(tmp_path / out), "--vocab-size", "270", *flags])
    meta = json.loads((tmp_path / out / "meta.json").read_text())
    return meta, tmp_path / out


def texts_of(folder, meta, split):
    """The examples of a split, decoded from its shard."""
    encoding = saved_encoding(folder, meta)
    examples = loader.ExampleSet([read_shard(folder / f"pairs_{split}_000000.bin")], meta["doc_token"], meta["separator"], split)
    return [[encoding.decode(view) for view in examples.views(e)] for e in range(len(examples))]


def test_what_is_written_is_what_was_read_and_overlaps_are_counted(tmp_path, capsys):
    train = [pair("one é", "1"), pair("two", "2"), pair("three\n", "3"), pair("two", "22")]
    test = [pair("two", "x"), pair("four", "1"), pair("one é", "2"), pair("five", "5")]
    meta, folder = prepare(tmp_path, train, test)
    assert texts_of(folder, meta, "train") == [["one é", "1"], ["two", "2"], ["three\n", "3"], ["two", "22"]]
    assert meta["overlap"] == {"examples": 4, "texts": 2, "codes": 2, "clean": 1}
    assert "2 of 4 test texts and 2 codes stand in train; 1 test examples are clean" in capsys.readouterr().out
    assert meta["vocab_size"] == meta["doc_token"] + 12 and meta["bytes_per_token"][meta["doc_token"]:] == [0] * 12
    groups, folder = prepare(tmp_path, [{"paraphrases": ["a", "b", "c"], "code": "x"}], [{"paraphrases": ["c", "d"]}, {"paraphrases": ["e", "f"]}], out="groups")
    assert texts_of(folder, groups, "train") == [["a", "b", "c"]] and groups["overlap"] == {"examples": 2, "clean": 1} and groups["kind"] == "groups"
    with pytest.raises(SystemExit, match="out exists: remove it"):
        prepare(tmp_path, train, test)
    with pytest.raises(SystemExit, match="different kinds"):
        prepare(tmp_path, train, [{"paraphrases": ["a", "b"]}], out="mixed")


def test_system_message_is_kept_where_it_says_something(tmp_path):
    same, differing = [pair("t", "c"), pair("u", "d")], [pair("t", "c", "x"), pair("u", "d", "y")]
    assert texts_of(*reversed(prepare(tmp_path, same, same)), "train")[0] == ["t", "c"]
    assert texts_of(*reversed(prepare(tmp_path, differing, same, out="b")), "train") == [["x\nt", "c"], ["y\nu", "d"]]
    assert texts_of(*reversed(prepare(tmp_path, same, same, "--system", "keep", out="c")), "train")[0] == ["s\nt", "c"]
    assert texts_of(*reversed(prepare(tmp_path, differing, same, "--system", "drop", out="d")), "train")[0] == ["t", "c"]


def test_split_keeps_copies_on_one_side_and_train_fraction_takes_the_first(tmp_path):
    examples = [(n, "pairs", None, [f"text {n % 40}", f"code {n}"]) for n in range(80)]
    train, test = pairs.split_examples(examples, 0.1)
    assert len(test) == 8 and not {v[0] for *_, v in train} & {v[0] for *_, v in test}
    meta, folder = prepare(tmp_path, words(16), words(4), "--train-fraction", "0.25")
    assert len(texts_of(folder, meta, "train")) == 4
    with pytest.raises(SystemExit, match="--train-fraction 0.0: must lie above 0"):
        prepare(tmp_path, words(4), words(4), "--train-fraction", "0", out="z")


def test_hugging_face_datasets_by_columns_and_groups(tmp_path):
    """A local dataset through the real loading code; the hub itself is out of reach of a test."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"q": f"question {i}", "a": f"answer {i}", "texts": [f"x{i}", f"y{i}", f"z{i}"]} for i in range(20)]
    write_lines(folder / "train.jsonl", *rows)
    pairs.main(["--dataset", str(folder), "--columns", "q", "a", "--out", str(tmp_path / "p"), "--vocab-size", "260"])
    meta = json.loads((tmp_path / "p" / "meta.json").read_text())
    everything = texts_of(tmp_path / "p", meta, "train") + texts_of(tmp_path / "p", meta, "val")
    assert sorted(everything) == sorted([r["q"], r["a"]] for r in rows) and len(texts_of(tmp_path / "p", meta, "val")) == 1
    assert [v for *_, v in pairs.read_jsonl(tmp_path / "p" / "test.jsonl")] == texts_of(tmp_path / "p", meta, "val")  # for evaluate.py
    for name, columns, group in (("g", ["texts"], "texts"), ("h", ["q", "a"], None)):
        pairs.main(["--dataset", str(folder), "--group", *columns, "--out", str(tmp_path / name), "--vocab-size", "260"])
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        assert meta["kind"] == "groups"
        assert texts_of(tmp_path / name, meta, "train")[0] in [r[group] if group else [r["q"], r["a"]] for r in rows]
    with pytest.raises(SystemExit, match="no column b; choose --columns TEXT CODE or --group COLUMN ... among q, a, texts"):
        pairs.main(["--dataset", str(folder), "--columns", "q", "b", "--out", str(tmp_path / "e")])
    with pytest.raises(SystemExit, match="line 1: column q: a group needs at least two texts"):
        pairs.main(["--dataset", str(folder), "--group", "q", "--out", str(tmp_path / "e")])


@pytest.mark.parametrize("flags, message", [
    ([], "give either --train or --dataset"), (["--train", "x", "--dataset", "y"], "give either --train or --dataset"),
    (["--train", "x", "--tokenizer", "gpt2", "--vocab-size", "300"], "give either --tokenizer or --vocab-size"),
    (["--train", "x", "--test-fraction", "2"], "--test-fraction 2.0: must lie above 0")])
def test_misuse_of_pairs(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        pairs.main(["--out", str(tmp_path / "o"), *flags])


# ---- data/nlregex.py


def test_generated_sentences_and_expressions_are_distinct_and_seeded():
    found = nlregex.generate(400, 3, seed=5)
    assert found == nlregex.generate(400, 3, seed=5) != nlregex.generate(400, 3, seed=6)
    texts = [t for wordings, _ in found for t in wordings]
    assert len(set(texts)) == 1200 and len({regex for _, regex in found}) == 400
    for wordings, regex in found:
        assert regex.count("(") == regex.count(")") and "{x}" not in regex + wordings[0] and "{n}" not in regex + wordings[0]
    # an expression without & and ~ is Python's too: (a dog or a ring) before a digit, as its sentence says
    either = ("({x})|({y})", 2, [("dog", 0, []), ("ring", 0, [])])
    before = nlregex.regex_of(("({x}).*({y})", 2, [either, ("[0-9]", 0, [])]))
    assert re.match(before, "dog and 7") and re.match(before, "ring 7") and not re.match(before, "dog") and not re.match(before, "7 and dog")
    words = nlregex.regex_of(("\\b({x})\\b", 2, [either]))
    assert re.search(words, "a ring") and not re.search(words, "a ringer") and not re.search(words, "adog")


def test_a_grammar_that_is_too_small_says_so(monkeypatch):
    monkeypatch.setattr(nlregex, "draw_tree", lambda rng, depth: ("[0-9]", 0, []))
    with pytest.raises(SystemExit, match="the grammar has no 20 sentences of 1 wordings; ask for fewer"):
        nlregex.generate(20, 1, 1)


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_nlregex_prepares_disjoint_splits_and_the_test_file(tmp_path, kind):
    meta = nlregex.prepare_default(tmp_path / "d", kind, train=200, test=40)
    assert meta["overlap"]["clean"] == 40 and meta["kind"] == kind
    assert len(pairs.read_jsonl(tmp_path / "d" / "test.jsonl")) == 40
    first = (tmp_path / "d" / "pairs_train_000000.bin").read_bytes()
    nlregex.prepare_default(tmp_path / "again", kind, train=200, test=40)
    assert (tmp_path / "again" / "pairs_train_000000.bin").read_bytes() == first


# ---- evaluate.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learnt 16 pairs by heart, and its files."""
    base = tmp_path_factory.mktemp("trained")
    train = words(16)
    test = write_lines(base / "test.jsonl", *train[:6], pair("lines with a pig 9", "(pig)"), pair(train[0]["messages"][1]["content"], "wrong"))
    folder = base / "data"
    pairs.main(["--train", write_lines(base / "train.jsonl", *train), "--test", test, "--out", str(folder), "--vocab-size", "300"])
    name = f"test-evaluate-{base.name}"
    done = run_cli(str(folder), f"--run_id={name}", "--iterations=100", "--train_batch_tokens=256", "--train_seq_len=64", "--model_dim=64", "--num_layers=2", "--loss_on=target",
                   "--jepa_objective=pair", "--jepa_lambda=0.02", "--jepa_pred_tokens=2", "--matrix_lr=0.02")
    assert done.returncode == 0, done.stderr[-2000:]
    yield ROOT / "logs" / name, test, base
    import shutil
    shutil.rmtree(ROOT / "logs" / name)


def evaluated(*flags):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main([str(f) for f in flags])
    return json.loads(out.getvalue().splitlines()[-1])


def test_accuracy_of_a_run_that_knows_its_pairs(trained):
    run, test, base = trained
    result = evaluated("--run", run, "--data", test)
    assert result.keys() == {"exact", "startswith", "n", "exact_clean", "startswith_clean", "n_clean", "seconds", "exact_wilson95", "startswith_wilson95"}
    assert result["exact"] == 6 / 8 and result["n"] == 8 and result["n_clean"] == 1 and result["exact_clean"] == 0
    assert json.loads((run / "accuracy-test.json").read_text()) == result
    # a batch of another size, and a file of prefixes: what is generated starts with them and is not they
    assert evaluated("--run", run, "--data", test, "--batch_size", 3)["exact"] == 6 / 8
    prefixes = write_lines(base / "prefix.jsonl", *(pair(p["messages"][1]["content"], p["messages"][2]["content"][:4]) for p in words(16)))
    result = evaluated("--run", run, "--data", prefixes)
    assert result["startswith"] == 1 and result["exact"] == 0


def test_similarity_is_that_of_the_views_alone(trained):
    run, test, _ = trained
    result = evaluated("--run", run, "--data", test, "--similarity")
    cfg, data, model = evaluate.open_run(run)
    assert cfg.jepa_pred_tokens == 2
    encode = saved_encoding(data.folder, data.meta).encode_ordinary
    cosines = []
    for text, code in evaluate.read_test(data, test, "pairs"):
        with torch.no_grad():
            u, v = (model._run_blocks(torch.tensor([[data.doc_token, *ids]]), -1)[0][0, -1] for ids in ([*encode(text), *data.preds], encode(code)))
        cosines.append(torch.cosine_similarity(u, v, dim=0).item())
    assert result["matched"]["mean"] == pytest.approx(np.mean(cosines), abs=1e-5) and result["pairs"] == 8
    assert result["matched"]["q50"] == pytest.approx(np.median(cosines), abs=1e-5)
    assert -1 <= result["shuffled"]["mean"] <= 1
    assert evaluated("--run", run, "--data", test, "--similarity", "--pred_tokens", 0)["matched"] != result["matched"]


def test_prompt_samples_by_seed(trained):
    run, _, _ = trained
    sample = lambda seed, temperature=1.5: evaluated("--run", run, "--prompt", "lines with", "--seed", seed, "--temperature", temperature)["text"]
    assert sample(1) == sample(1) and len({sample(s) for s in range(5)}) > 1
    assert sample(1, 0) == sample(2, 0)


def test_a_run_on_text_answers_a_prompt_and_nothing_else(data_path, run_id, tmp_path):
    assert run_cli(data_path, f"--run_id={run_id}", "--iterations=2", "--jepa_lambda=0.1").returncode == 0
    run = ROOT / "logs" / run_id
    assert evaluated("--run", run, "--prompt", "the cat", "--tokens", 5)["prompt"] == "the cat"
    for flags in ([], ["--similarity"]):
        with pytest.raises(SystemExit, match="was trained on text .*choose --prompt"):
            evaluate.main(["--run", str(run), "--data", write_lines(tmp_path / "x.jsonl", PAIR), *flags])


@pytest.mark.parametrize("flags, message", [
    (["--run", "/nowhere", "--prompt", "x"], "no config.yaml in it"), (["--run", "RUN"], "give either --data, with or without --similarity, or --prompt"),
    (["--run", "RUN", "--data", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"), (["--run", "RUN", "--data", "GROUPS"], "holds groups, here pairs are needed")])
def test_misuse_of_evaluate(trained, tmp_path, flags, message):
    names = {"RUN": str(trained[0]), "GROUPS": write_lines(tmp_path / "g.jsonl", {"paraphrases": ["a", "b"]})}
    with pytest.raises(SystemExit, match=message) as e:
        evaluate.main([names.get(f, f) for f in flags])
    assert "\n" not in str(e.value)


def test_the_embedded_pairs_are_prepared_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "ROOT", tmp_path)
    for name in ("data/nlregex", "data/nlregex_groups"):
        monkeypatch.setattr(nlregex, "prepare_default", lambda out, original=nlregex.prepare_default: original(out, train=60, test=20))
        data = loader.open_data(train_gpt.Config(**{**TINY, "data_path": name, "train_seq_len": 128, "jepa_objective": "pair", "jepa_lambda": 0.1}))
        assert isinstance(data, loader.PairData) and len(data.sets["train"]) == 60 and (tmp_path / name / "test.jsonl").exists()
        monkeypatch.undo()
        monkeypatch.setattr(loader, "ROOT", tmp_path)
