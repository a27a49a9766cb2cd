"""Files as people have them: each form gives the rows of its JSON-lines twin."""

import csv
import gzip
import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import hf
import train_gpt
from conftest import CPU, make_config, train_in_process
from data import prepare_pairs, prepare_steps, prepare_text
from nanojepa.batches import TokenData
from nanojepa.eval.tasks import read_questions
from nanojepa.hf.layout import read_sources
from nanojepa.hf.settings import Data
from nanojepa.readers import choose_split, open_dataset, open_rows, read_text
from nanojepa.records import parse, read_examples
from nanojepa.shards import read_meta, read_shard, write_shard
from nanojepa.tokenizer import saved_encoding
from nanojepa.vocabulary import load_vocabulary

ROWS = [
    {"question": "What is 2 + 2?", "answer": "four"},
    {"question": 'säh, "日本"\n\tzwei', "answer": "a\r\nb,c;d"},
    {"question": "🙂", "answer": " blank at the ends "},
]
SAID = [[row["question"], row["answer"]] for row in ROWS]


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(delimiter):
    def write(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def write_bytes(data):
    return lambda path: path.write_bytes(data)


def zst(data):
    def write(path):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)

    return write


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


UTF8 = lines().encode()
FILES = {
    "a.jsonl": write_bytes(UTF8),
    "a.NDJSON": write_bytes(UTF8),
    "a.jsonlines": write_bytes(UTF8),
    "a": write_bytes(UTF8),
    "no end.jsonl": write_bytes(UTF8.rstrip()),
    "array.json": write_bytes(json.dumps(ROWS).encode()),
    "pretty.JSON": write_bytes(json.dumps(ROWS, indent=2).encode()),
    "lines.json": write_bytes(UTF8),
    "bom.jsonl": write_bytes(b"\xef\xbb\xbf" + UTF8),
    "bom array.json": write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode()),
    "crlf.jsonl": write_bytes(UTF8.replace(b"\n", b"\r\n")),
    "utf16.jsonl": write_bytes(lines().encode("utf-16")),
    "utf16be.jsonl": write_bytes(b"\xfe\xff" + lines().encode("utf-16-be")),
    "a.jsonl.gz": write_bytes(gzip.compress(UTF8)),
    "members.jsonl.GZ": write_bytes(gzip.compress(UTF8[:40]) + gzip.compress(UTF8[40:])),
    "a.json.zst": zst(UTF8),
    "a.csv": table(","),
    "a.TSV": table("\t"),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_rows_of_its_twin(name, tmp_path):
    path = tmp_path / name
    FILES[name](path)
    rows = open_rows(path)
    assert [rows.parse(raw) for _, raw in rows.items] == ROWS
    assert [record.views for record in read_examples(path)] == SAID
    assert [q.user for q in read_questions(str(path), "exact")] == [row["question"] for row in ROWS]


def test_csv_as_excel_writes_it(tmp_path):
    path = tmp_path / "excel.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, dialect="excel").writerows([list(ROWS[0]), *SAID])
    assert [record.views for record in read_examples(path)] == SAID


WRONG = {
    "latin.jsonl": (lines().encode("latin-1", "replace"), "line 2: not UTF-8 at its byte"),
    "latin.csv": ("question,answer\nq,a\nsäh,b".encode("latin-1"), "line 3: not UTF-8 at its byte"),
    "cut.jsonl.gz": (gzip.compress(UTF8 * 50)[:-30], r"line \d+: damaged"),
    "none.jsonl.gz": (b"plain text\n", "line 1: damaged"),
    "none.jsonl.zst": (b"plain text\n", "line 1: damaged"),
    "odd.jsonl": (b"\xff\xfea", "line 1: (not UTF-16|damaged)"),
    "cells.csv": (b"question,answer\nq,a\nq,a,b\n", "line 3: 3 cells under 2 columns"),
    "fewer.csv": (b"question,answer\nq\n", "line 2: 1 cells under 2 columns"),
    "twice.csv": (b"question,question\nq,a\n", "line 1: columns need names that differ"),
    "quote.csv": (b'question,answer\nq,"a\n', "line 2: unexpected end of data"),
    "none.parquet": (b"PAR1 not", "no Parquet file"),
    "open.json": (b'[{"question": "q", "answer": "a"},\n{"question"', "line 2: not JSON"),
    "comma.json": (b'[{"question": "q", "answer": "a"}\n{"question": 1}]', "line 2: no comma or"),
    "half.jsonl": (b'{"question": "\\ud800", "answer": "a"}', "line 1: question holds half"),
    "nul.jsonl": (b'{"question": "a\0b", "answer": "a"}', "line 1: not JSON"),
    "object.json": (b'{"rows": [1]}', r"line 1: its columns \['rows'\] are neither"),
    "empty.jsonl": (b"", "holds no usable line"),
    "empty.json": (b"[]", "holds no usable line"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_named_by_file_and_line(name, tmp_path):
    data, message = WRONG[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*{message}") as error:
        read_examples(path)
    assert "\n" not in str(error.value)


def test_a_line_of_50_mb_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a" * 50_000_000}))
    assert len(read_examples(path)[0].views[1]) == 50_000_000


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
texts = texts.filter(str.strip)


@settings(deadline=None)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.sampled_from(["utf-8", "utf-16"])
)
def test_any_texts_come_back_from_every_form(tmp_path_factory, pairs, encoding):
    folder = tmp_path_factory.mktemp("any")
    rows = [{"prompt": a, "completion": b} for a, b in pairs]
    (folder / "a.jsonl").write_bytes(lines(rows).encode(encoding))
    (folder / "a.json").write_bytes(json.dumps(rows, indent=1, ensure_ascii=False).encode(encoding))
    with open(folder / "a.csv", "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert [r.views for r in read_examples(folder / name)] == [list(pair) for pair in pairs], (
            name
        )


# ---- forms of rows

USER, ANSWER = "What is 2 + 2?", "four"


def turns(*said, role="role", text="content"):
    return [{role: name, text: value} for name, value in said]


FORMS = {
    "messages": {"messages": turns(("user", USER), ("assistant", ANSWER))},
    "messages in parts": {
        "messages": turns(
            ("user", [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]),
            ("assistant", [{"type": "text", "text": ANSWER}]),
        )
    },
    "sharegpt": {
        "conversations": turns(("human", USER), ("gpt", ANSWER), role="from", text="value")
    },
    "sharegpt with roles": {"conversations": turns(("user", USER), ("assistant", ANSWER))},
    "alpaca": {"instruction": USER, "input": "", "output": ANSWER},
    "alpaca without input": {"instruction": USER, "output": ANSWER},
    "prompt": {"prompt": USER, "completion": ANSWER},
    "prompt as messages": {
        "prompt": turns(("user", USER)),
        "completion": turns(("assistant", ANSWER)),
    },
    "response": {"prompt": USER, "response": ANSWER},
    "question": {"question": USER, "answer": ANSWER, "id": 3},
    "code": {"text": USER, "code": ANSWER},
}


@pytest.mark.parametrize("name", FORMS)
def test_known_forms_are_recognised_and_said_to_be(name, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(FORMS[name]) + "\n" + json.dumps(FORMS[name]))
    record, _ = read_examples(path)
    assert (record.kind, record.system, record.views) == ("pairs", None, [USER, ANSWER])
    said = capsys.readouterr().err
    ours = name.startswith("messages")
    assert said.count("read by its columns") == (0 if ours else 1)


def test_systems_of_other_forms_are_kept():
    said = turns(("system", "s"), ("human", USER), ("gpt", ANSWER), role="from", text="value")
    alpaca = {"instruction": USER, "input": "and?", "output": ANSWER, "system": "s"}
    developer = {"messages": turns(("developer", "s"), ("user", USER), ("assistant", ANSWER))}
    assert parse(1, {"conversations": said}).system == "s"
    assert parse(1, developer).system == "s"
    assert parse(1, alpaca)[2:] == ("s", [f"{USER}\n\nand?", ANSWER])


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"messages": turns(("user", [{"type": "image", "url": "x"}]), ("assistant", "a"))},
            "image",
        ),
        ({"messages": turns(("user", []), ("assistant", "a"))}, "user has no parts"),
        (
            {"conversations": turns(("human", "q"), role="from", text="value")},
            "there must be one user",
        ),
        ({"conversations": "text"}, "conversations is no list"),
        ({"instruction": "", "output": "a"}, "instruction is empty"),
        ({"prompt": None, "completion": "a"}, "prompt is not a text"),
        ({"a": 1, "b": 2}, "name those of the two texts"),
    ],
)
def test_rows_that_are_none_say_why(row, message):
    with pytest.raises(ValueError, match=message):
        parse(1, row)


def test_columns_are_mapped_by_a_flag_in_every_script(tmp_path):
    rows = [{"de": f"ein Haus {n}", "en": f"a house {n}\nof stone"} for n in range(12)]
    path = tmp_path / "a.jsonl"
    path.write_text(lines(rows))
    flags = ["--columns", "de", "en"]
    prepare_pairs.main(["--train", str(path), "--out", str(tmp_path / "d"), *flags])
    assert read_meta(tmp_path / "d")["kind"] == "pairs"
    prepare_steps.main(["--in", str(path), "--out", str(tmp_path / "s.jsonl"), *flags])
    assert read_examples(tmp_path / "s.jsonl")[0].views == ["ein Haus 0", "a house 0\n\nof stone"]
    source = read_sources(Data(train_file=str(path), columns="de,en"))["train"]
    assert source.records[0].views == ["ein Haus 0", "a house 0\nof stone"]
    assert read_questions(str(path), "exact", columns=("de", "en"))[0].user == "ein Haus 0"
    with pytest.raises(ValueError, match=r"line 1: no column x among 'de', 'en'"):
        read_examples(path, columns=("x", "en"))
    with pytest.raises(ValueError, match="dataset.columns=a: must name two"):
        Data(columns="a")


# ---- splits of data sets


def save_splits(folder, *names):
    """A folder of JSON lines, a file for each split."""
    folder.mkdir()
    for n, name in enumerate(names):
        (folder / f"{name}.jsonl").write_text(lines(ROWS[: n + 1]))
    return str(folder)


@pytest.mark.parametrize("saved", [False, True], ids=["files", "save_to_disk"])
@pytest.mark.parametrize("second", ["test", "validation", "dev"])
def test_the_split_that_is_there_is_evaluated(tmp_path, capsys, saved, second):
    folder = save_splits(tmp_path / "rows", "train", "validation" if second == "dev" else second)
    if saved:
        both = datasets.load_dataset(folder)
        both = datasets.DatasetDict({"train": both["train"], second: list(both.values())[1]})
        both.save_to_disk(tmp_path / "saved")
        folder = str(tmp_path / "saved")
    sources = read_sources(Data(train_file=folder, eval_file=folder))
    assert [len(source.records) for source in sources.values()] == [1, 2]
    said = capsys.readouterr().err
    assert f"{folder}: split train of train, " in said and "(dataset.test_split)" in said


def test_a_choice_of_splits_is_asked_for_by_its_key(tmp_path):
    folder = save_splits(tmp_path / "rows", "train", "test")
    with pytest.raises(
        ValueError, match="has no split dev; dataset.test_split: one of train, test"
    ):
        read_sources(Data(train_file=folder, eval_file=folder, test_split="dev"))
    with pytest.raises(ValueError, match=r"x has the splits a, b; choose one with --split"):
        choose_split("x", ["a", "b"], "", ("train",), "--split")
    assert choose_split("x", ["main"], "", ("train",), "--split") == "main"
    part = read_sources(Data(train_file=folder, train_split="test[:50%]"))["train"]
    assert len(part.records) == 1


def test_a_home_that_cannot_be_written_costs_no_dataset(tmp_path, monkeypatch, capsys):
    folder = save_splits(tmp_path / "rows", "train")
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path / "rows" / "train.jsonl" / "x"
    )
    assert len(open_dataset(folder)) == 1
    assert "datasets are kept in" in capsys.readouterr().err


def test_a_dataset_on_disk_without_splits_is_taken_whole(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert len(open_dataset(tmp_path / "one")) == len(ROWS)


# ---- texts


def prepared(tmp_path, source, *flags):
    """The documents of both splits, texts."""
    out = tmp_path / "out"
    prepare_text.main(["--source", str(source), "--vocab-size", "300", "--out", str(out), *flags])
    meta, found = read_meta(out), []
    encoding = saved_encoding(out, meta)
    for path in sorted(out.glob("*.bin")):
        tokens = read_shard(path).tolist()
        starts = [n for n, token in enumerate(tokens) if token == meta["doc_token"]]
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            found.append(encoding.decode(tokens[begin + 1 : end]))
    return sorted(found)


def test_a_folder_of_texts_is_a_document_a_file(tmp_path):
    books, said = tmp_path / "books", []
    for n in range(6):
        path = books / ("deep" if n % 2 else "") / f"b{n}{'.TXT' if n % 3 else '.txt.gz'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        said.append(f"book {n}\r\n\r\nwith lines, säh\n" * 5)
        data = said[-1].encode()
        path.write_bytes(data if n % 3 else gzip.compress(data))
    (books / "cover.png").write_bytes(b"\x89PNG")
    assert prepared(tmp_path, books, "--val-fraction", "0.2") == sorted(said)


@pytest.mark.parametrize("form", ["csv", "parquet", "ndjson.gz", "json"])
def test_rows_of_text_are_documents(tmp_path, form):
    rows = [{"id": str(n), "body": f"document {n}, säh\nline"} for n in range(8)]
    path = tmp_path / f"pages.{form}"
    if form == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "body"])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines(rows).encode()))
    found = prepared(tmp_path, path, "--field", "body", "--val-fraction", "0.2")
    assert found == [row["body"] for row in rows]


def test_a_text_keeps_its_line_ends_and_loses_its_mark(tmp_path):
    text = "a\r\nb\rc\n\ufeffd\u2028\x0c\0e"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_bytes(text.encode("utf-16"))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "b.txt") == text


# ---- shards of others


def test_nanogpt_s_files_without_a_header(tmp_path):
    tokens = np.arange(600, dtype="<u2") % 250
    tokens.tofile(tmp_path / "train.bin")
    tokens[:200].tofile(tmp_path / "val.bin")
    data = TokenData(make_config(str(tmp_path), vocab_size=256))
    assert data.train[0].tolist() == tokens.tolist() and len(data.val[0]) == 200
    log = train_in_process(str(tmp_path), vocab_size=256, iterations=2)
    assert log.rows[-1][1]["val_loss"] > 0
    (tmp_path / "train.bin.sha256").unlink()
    with open(tmp_path / "train.bin", "ab") as file:
        file.write(b"\1")
    with pytest.raises(ValueError, match="train.bin: 1201 bytes are no tokens of two bytes"):
        TokenData(make_config(str(tmp_path), vocab_size=256))


TEXTS = ["the house of the old man", "säh  two blanks, 日本 and 12345", "x", "the the the"] * 20


def sentencepiece_model(folder, **options):
    prefix = folder / "sp"
    options = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        character_coverage=0.99,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return f"{prefix}.model"


def tokenizer_json(folder, form):
    core = Tokenizer(models.BPE(byte_fallback=form == "metaspace", unk_token="<unk>"))
    special = ["<s>", "<unk>"]
    if form == "metaspace":
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=form == "prefix")
        core.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    size = 600
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    path = folder / "tokenizer.json"
    state = json.loads(core.to_str())
    for token in state["added_tokens"]:  # bytes are text
        token["special"] = not token["content"].startswith("<0x")
    state["added_tokens"] = [t for t in state["added_tokens"] if t["special"]]
    path.write_text(json.dumps(state))
    return str(path)


VOCABULARIES = {
    "sentencepiece": sentencepiece_model,
    "unigram": lambda folder: sentencepiece_model(folder, model_type="unigram", vocab_size=288),
    "no prefix": lambda folder: sentencepiece_model(folder, add_dummy_prefix=False),
    "byte level": lambda folder: tokenizer_json(folder, "plain"),
    "byte level, prefix": lambda folder: tokenizer_json(folder, "prefix"),
    "metaspace": lambda folder: tokenizer_json(folder, "metaspace"),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_bytes_of_others_shards_are_those_of_the_text(kind, tmp_path):
    """The reference is the length of the texts that were encoded."""
    name = VOCABULARIES[kind](tmp_path)
    vocabulary = load_vocabulary(name)
    said = ["the house", " the  old man ", "säh 日本", "unseen ☃ 🙂", "x"]
    if kind in ("metaspace", "byte level, prefix"):  # it gives "the" and " the" the same tokens
        said.remove(" the  old man ")
    tokens = [token for text in said for token in (vocabulary.marker, *vocabulary.encode(text))]
    write_shard(tmp_path / "x_train_0.bin", tokens * 40)
    write_shard(tmp_path / "x_val_0.bin", tokens)
    data = TokenData(make_config(str(tmp_path), tokenizer=name, train_seq_len=8))
    assert data.doc_token == vocabulary.marker and "its own" in data.warnings[-1]
    idx, targets = np.array(tokens[:-1])[None], np.array(tokens[1:])[None]
    assert data.text_bytes(idx, targets) == sum(len(text.encode()) for text in said)
    share = train_gpt.divide_batch(data.cfg, 0, 1, CPU)
    batches = [batch for _, batch in data.val_batches(share)]
    counted = sum(data.text_bytes(b.idx.numpy(), b.targets.numpy()) for b in batches)
    assert counted == sum(len(text.encode()) for text in said)


def test_a_run_on_sentencepiece_shards_has_bits_per_byte_and_a_sample(tmp_path):
    name = sentencepiece_model(tmp_path)
    vocabulary = load_vocabulary(name)
    tokens = [token for text in TEXTS for token in (1, *vocabulary.encode(text))]
    write_shard(tmp_path / "x_train_0.bin", tokens)
    write_shard(tmp_path / "x_val_0.bin", tokens[:300])
    log = train_in_process(str(tmp_path), tokenizer=name, iterations=2, jepa_lambda=0.1)
    assert log.rows[-1][1]["val_bpb"] > 0


def test_a_tokenizer_whose_bytes_are_unknown_is_refused(tmp_path):
    core = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match="words.json: no tokenizer .*so the bytes are unknown"):
        load_vocabulary(str(tmp_path / "words.json"))
    (tmp_path / "x.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="x.model: no tokenizer that can be read"):
        load_vocabulary(str(tmp_path / "x.model"))


def test_fine_tuning_data_goes_through_the_same_reader(tmp_path):
    path = tmp_path / "a.csv"
    table(",")(path)
    source = read_sources(Data(train_file=str(path)))["train"]
    assert [record.views for record in source.records] == SAID
    with open(path, "a", encoding="utf-8") as file:
        file.write("only one,\n")
    with pytest.raises(ValueError, match="answer is empty; mend it, or skip such lines with --bad"):
        read_sources(Data(train_file=str(path)))
    assert len(read_sources(Data(train_file=str(path), bad="skip"))["train"].records) == 3
    assert os.path.exists(hf.make_folder(tmp_path / "m", "llama"))
