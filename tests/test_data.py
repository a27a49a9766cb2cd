"""Shards, tokenizers, loader and bits per byte; what data/ writes is what train_gpt.py reads."""
import base64
import json
import math
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from conftest import MemoryLog, make_config, texts, train_in_process
from data import fineweb, pairs, shards, stdlib, text
from data.shards import prepare, read_shard, saved_encoding
from loader import TokenData


def meta_of(folder):
    return json.loads((Path(folder) / "meta.json").read_text())


def decode(folder):
    """{split: list of documents} of a prepared folder, by the tokens' bytes."""
    table = shards.token_table(str(Path(folder) / "tokenizer.tiktoken"))
    out = {}
    for split in ("train", "val"):
        tokens = np.concatenate([read_shard(f) for f in sorted(Path(folder).glob(f"*_{split}_*.bin"))])
        pieces = np.split(tokens, np.flatnonzero(tokens == meta_of(folder)["doc_token"]))[1:]
        out[split] = [b"".join(table[t] for t in piece[1:]).decode() for piece in pieces]
    return out


# ---- what is written


def test_shards_hold_the_texts_byte_for_byte_marked_and_split_by_document(data_path):
    documents = decode(data_path)
    assert sorted(documents["train"] + documents["val"]) == sorted(texts() * 4)
    assert not set(documents["train"]) & set(documents["val"]) and documents["val"]
    meta = meta_of(data_path)
    assert meta["vocab_size"] == 300 and len(meta["bytes_per_token"]) == 300 and meta["bytes_per_token"][meta["doc_token"]] == 0
    for split in ("train", "val"):
        assert sum(s["text_bytes"] for f, s in meta["shards"].items() if split in f) == sum(len(d.encode()) for d in documents[split])


def test_one_document_gives_its_last_tenth(tmp_path):
    book = "".join(f"Chapter {i}: it was a dark night. " for i in range(200))
    (tmp_path / "book.txt").write_text(book)
    text.main(["--source", str(tmp_path / "book.txt"), "--vocab-size", "280", "--out", str(tmp_path / "out")])
    documents = decode(tmp_path / "out")
    assert documents == {"train": [book[:int(len(book) * 0.9)]], "val": [book[int(len(book) * 0.9):]]}


def test_text_with_separator_and_jsonl_and_a_dataset_from_disk(tmp_path, monkeypatch):
    docs = texts()[:20]
    (tmp_path / "a.txt").write_text("<sep>".join(docs))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in docs) + "\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "hub" / "train.jsonl")  # a folder that datasets can load as it loads the hub's
    common = ["--vocab-size", "300", "--val-fraction", "0.2"]
    text.main(["--source", str(tmp_path / "a.txt"), "--separator", "<sep>", "--out", str(tmp_path / "o1"), *common])
    text.main(["--source", str(tmp_path / "a.jsonl"), "--field", "body", "--out", str(tmp_path / "o2"), *common])
    text.main(["--source", str(tmp_path / "hub"), "--field", "body", "--documents", "10", "--out", str(tmp_path / "o3"), *common])
    first, second, third = (decode(tmp_path / o) for o in ("o1", "o2", "o3"))
    assert first == second and sorted(first["train"] + first["val"]) == sorted(docs)
    assert sorted(third["train"] + third["val"]) == sorted(docs[:10])


def ranks_file(path, merges=()):
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate([bytes([b]) for b in range(256)] + list(merges))))
    return path


def test_a_file_of_ranks_is_a_tokenizer(tmp_path):
    ranks = ranks_file(tmp_path / "r.tiktoken", [b" t", b"he"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in texts()))
    text.main(["--source", str(tmp_path / "a.jsonl"), "--tokenizer", str(ranks), "--out", str(tmp_path / "out")])
    assert meta_of(tmp_path / "out")["vocab_size"] == 259 and meta_of(tmp_path / "out")["doc_token"] == 258
    documents = decode(tmp_path / "out")
    assert sorted(documents["train"] + documents["val"]) == sorted(texts())


def test_stdlib_is_real_text_without_tests_and_repeats():
    first = list(stdlib.documents())
    assert len(first) > 200 and sum(map(len, first)) > 5_000_000 and first == list(stdlib.documents())
    assert any("class Random(" in d for d in first) and not any("class RegressionTests(unittest.TestCase)" in d for d in first)


def test_fineweb_fetches_what_is_missing_and_writes_meta(tmp_path, monkeypatch):
    """The hub is replaced by a folder of its files; names, resuming and meta.json are the real code's."""
    fetched = []

    def hf_hub_download(repository, name, repo_type, local_dir):
        fetched.append(name)
        assert (repository, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        shards.write_shard(Path(local_dir) / name, np.random.default_rng(0).integers(0, 50257, 3000))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    table = [b"%d" % i for i in range(50256)] + [b""]
    monkeypatch.setattr(fineweb, "token_table", lambda name: table)
    monkeypatch.setattr(shards, "token_table", lambda name: table)
    (tmp_path / "fw").mkdir()
    fineweb.main(["--shards", "1", "--out", str(tmp_path / "fw")])
    fineweb.main(["--shards", "2", "--out", str(tmp_path / "fw")])
    assert fetched == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    data = TokenData(make_config(str(tmp_path / "fw")))
    assert data.vocab_size == 50257 and data.doc_token == 50256 and len(data.train) == 2
    (tmp_path / "fw" / "fineweb_train_000001.bin").write_bytes((tmp_path / "fw" / "fineweb_train_000001.bin").read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="sha256"):
        TokenData(make_config(str(tmp_path / "fw")))
    (tmp_path / "fw" / "meta.json").write_text("{}")
    with pytest.raises(SystemExit, match="^error: .*meta.json: .* written by something else; remove meta.json and run this again, which keeps the shards$"):
        fineweb.main(["--shards", "2", "--out", str(tmp_path / "fw")])


@pytest.mark.parametrize("argv, message", [
    (["--source", "{d}/missing.jsonl", "--vocab-size", "300"], "missing.jsonl"),
    (["--source", "{d}/no/such_dataset", "--vocab-size", "300"], "neither a file nor a dataset"),
    (["--source", "{d}/bad.jsonl", "--vocab-size", "300"], "bad.jsonl, line 2: no JSON object with the field 'text'"),
    (["--source", "{d}/number.jsonl", "--vocab-size", "300"], "number.jsonl, line 1: field 'text' is not a text"),
    (["--source", "{d}/half.jsonl", "--vocab-size", "300"], "half.jsonl, line 1"),
    (["--source", "{d}/empty.txt", "--vocab-size", "300"], "holds no text"),
    (["--source", "{d}/latin.txt", "--vocab-size", "300"], "latin.txt, byte 1: not UTF-8"),
    (["--source", "{d}/ok.txt", "--vocab-size", "100000"], "--vocab-size 100000"),
    (["--source", "{d}/ok.txt", "--vocab-size", "100"], "--vocab-size 100"),
    (["--source", "{d}/ok.txt"], "either --tokenizer or --vocab-size"),
    (["--source", "{d}/ok.txt", "--tokenizer", "gpt9"], "neither a file of ranks nor one of tiktoken's"),
    (["--source", "{d}/ok.txt", "--tokenizer", "{d}/ok.txt"], "ok.txt, line 1"),
    (["--source", "{d}/ok.txt", "--tokenizer", "{d}/big.tiktoken"], "at most 65536"),
    (["--source", "{d}/ok.txt", "--tokenizer", "{d}/holes.tiktoken"], "holes.tiktoken: no rank for the byte 101"),
    (["--source", "{d}/ok.txt", "--vocab-size", "300", "--val-fraction", "1"], "between 0 and 1"),
])
def test_bad_sources_are_one_line_and_leave_nothing_half_made(tmp_path, monkeypatch, argv, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = {"bad.jsonl": b'{"text": "a"}\n{"test": "b"}\n', "number.jsonl": b'{"text": 3}\n', "half.jsonl": b'{"text": "\\ud800"}\n',
             "empty.txt": b"", "latin.txt": b"a\xe9 b", "ok.txt": b"some text of one document"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if "big.tiktoken" in argv[-1]:
        ranks_file(tmp_path / "big.tiktoken", [b"%05d!" % i for i in range(65536)])
    (tmp_path / "holes.tiktoken").write_bytes(ranks_file(tmp_path / "holes.tiktoken").read_bytes().replace(b"ZQ== 101\n", b""))  # no e
    with pytest.raises(SystemExit) as e:
        text.main([a.replace("{d}", str(tmp_path)) for a in argv] + ["--out", str(tmp_path / "out")])
    assert message in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.glob("out*"))


def test_the_tokenizer_of_a_data_folder_must_be_as_its_meta_says(tmp_path, data_path):
    """Whoever gives it: text.py, pairs.py, or a run on shards of another project. Gaps among the ranks are p50k_base's too."""
    gaps = ranks_file(tmp_path / "gaps.tiktoken", [b"th"])
    gaps.write_bytes(gaps.read_bytes().replace(b" 256", b" 260"))
    assert shards.load_tokenizer(str(gaps)).encode_ordinary("the") == [260, 101]
    shutil.copytree(data_path, tmp_path / "d")
    (tmp_path / "a.txt").write_text("a text of one document " * 50)
    (tmp_path / "a.jsonl").write_text(json.dumps({"paraphrases": ["a", "b"]}) + "\n")
    (tmp_path / "f").mkdir()
    cfg, file = make_config(foreign(tmp_path / "f"), tokenizer=str(tmp_path / "d" / "tokenizer.tiktoken")), tmp_path / "d" / "tokenizer.tiktoken"
    makes = [lambda: text.main(["--source", str(tmp_path / "a.txt"), "--tokenizer", str(file), "--out", str(tmp_path / "o1")]),
             lambda: pairs.main(["--train", str(tmp_path / "a.jsonl"), "--test", str(tmp_path / "a.jsonl"), "--tokenizer", str(file), "--out", str(tmp_path / "o2")]),
             lambda: TokenData(cfg)]
    for make in makes:
        make()
    shutil.rmtree(tmp_path / "o1"), shutil.rmtree(tmp_path / "o2")
    assert not (tmp_path / "d" / "tokenizer.tiktoken.sha256").exists()  # meta.json has it
    lines = file.read_bytes().splitlines(True)
    lines[-1] = base64.b64encode(b"zzzz") + b" " + lines[-1].split()[1] + b"\n"  # another token: nothing else is wrong with it
    file.write_bytes(b"".join(lines))
    for make in makes:
        with pytest.raises((ValueError, SystemExit), match=r"tokenizer.tiktoken: its sha256 is not the one in meta.json") as e:
            make()
        assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("o[12]*"))


def test_what_fails_halfway_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shards, "write_meta", full)
    monkeypatch.setattr(pairs, "write_meta", full)
    for make in (lambda out: shards.prepare(out, "x", lambda: iter(texts()), source="", licence="", val_fraction=0.2, vocab_size=270),
                 lambda out: pairs.prepare_pairs(out, *[[(1, "pairs", None, ["a", "b"])]] * 2, source="", vocab_size=258)):
        with pytest.raises(OSError, match="No space"):
            make(tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SystemExit, match="exists"):
        text.main(["--source", str(tmp_path / "a.txt"), "--vocab-size", "300", "--out", str(tmp_path / "out")])


# ---- what is read


def foreign(tmp_path, tokens=(0, 1, 2, 3) * 100, val=(4, 5, 6) * 50):
    """Shards of another project: no meta.json."""
    shards.write_shard(tmp_path / "x_train_000001.bin", np.array(tokens))
    shards.write_shard(tmp_path / "x_val_000000.bin", np.array(val))
    return str(tmp_path)


def corrupt(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


@pytest.mark.parametrize("change, message", [
    (lambda b: b"\0" + b[1:], "not a token shard"), (lambda b: b[:4] + b"\2" + b[5:], "shard version 2"),
    (lambda b: b[:-2], "it was cut off"), (lambda b: b + b"\0\0", "it was cut off"), (lambda b: b[:100], "not a token shard"),
    (lambda b: b"", "not a token shard"), (lambda b: b[:8] + bytes(1016), "holds no tokens"), (lambda b: b[:-2] + b"\1\1", "sha256")])
def test_damaged_shards_are_named(tmp_path, data_path, change, message):
    shutil.copytree(data_path, tmp_path / "d")
    shard = next((tmp_path / "d").glob("*_train_*.bin"))
    corrupt(shard, change)
    with pytest.raises(ValueError, match=message) as e:
        TokenData(make_config(str(tmp_path / "d")))
    assert shard.name in str(e.value) and "\n" not in str(e.value)


def test_foreign_shards(tmp_path):
    assert TokenData(make_config(foreign(tmp_path))).vocab_size == 64  # the largest token and one, up to a multiple of 64
    with pytest.raises(ValueError, match="token 6 is outside the vocabulary of 5"):
        TokenData(make_config(str(tmp_path), vocab_size=5))
    data = TokenData(make_config(str(tmp_path), vocab_size=300))
    assert data.bytes_per_token is None and "no meta.json" in data.no_bpb and data.doc_token == 50256
    ranks = ranks_file(tmp_path / "r.tiktoken", [b"abc"])
    data = TokenData(make_config(str(tmp_path), tokenizer=str(ranks), doc_token=257))
    assert data.vocab_size == 258 and data.bytes_per_token.tolist() == [1] * 256 + [3, 0]
    _, log = train_in_process(make_config(str(tmp_path), vocab_size=300, jepa_lambda=0.1, iterations=2))  # a row without marker is one document
    assert log.rows[-1][1]["val_bpb"] is None and log.curve("jepa_loss")


@pytest.mark.parametrize("remove, message", [("*_train_*.bin", r"no \*_train_\*.bin"), ("*_val_*.bin", r"no \*_val_\*.bin")])
def test_missing_files(tmp_path, remove, message):
    foreign(tmp_path)
    next(tmp_path.glob(remove)).unlink()
    with pytest.raises(ValueError, match=message):
        TokenData(make_config(str(tmp_path), vocab_size=300))


def test_a_shard_that_fits_both_names_is_refused_and_never_written(tmp_path):
    (tmp_path / "wiki_train_val_set.txt").write_text("a text of one document " * 50)
    out = tmp_path / "out"
    text.main(["--source", str(tmp_path / "wiki_train_val_set.txt"), "--vocab-size", "270", "--out", str(out)])
    assert len(list(out.glob("*_train_*.bin"))) == len(list(out.glob("*_val_*.bin"))) == 1
    foreign(tmp_path)
    next(tmp_path.glob("x_train_*.bin")).rename(tmp_path / "x_train_val_1.bin")
    with pytest.raises(ValueError, match="both"):
        TokenData(make_config(str(tmp_path)))


def test_carriage_returns_keep_their_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one line\r\nand another\r\n" * 40)
    text.main(["--source", str(tmp_path / "a.txt"), "--vocab-size", "270", "--out", str(tmp_path / "out")])
    documents = decode(tmp_path / "out")
    assert (documents["train"][0] + documents["val"][0]).encode() == b"one line\r\nand another\r\n" * 40


def test_other_bad_data(tmp_path, data_path):
    with pytest.raises(ValueError, match="VAL_TOKENS=1"):
        TokenData(make_config(data_path, val_tokens=1))
    with pytest.raises(ValueError, match="DATA_PATH=/nowhere: no such folder"):
        TokenData(make_config("/nowhere"))
    with pytest.raises(ValueError, match="the val split .* lower TRAIN_SEQ_LEN"):
        TokenData(make_config(data_path, train_seq_len=100_000))
    shutil.copytree(data_path, tmp_path / "d")
    next((tmp_path / "d").glob("*_val_*.bin")).rename(tmp_path / "d" / "other_val_000000.bin")
    with pytest.raises(ValueError, match="disagree on other_val_000000.bin, tiny_val_000000.bin"):
        TokenData(make_config(str(tmp_path / "d")))
    meta = meta_of(tmp_path / "d")
    (tmp_path / "d" / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "sha256"}))  # as before it had one
    with pytest.raises(ValueError, match="meta.json: its last key is not the sha256 .*; remove the folder and make the data again"):
        TokenData(make_config(str(tmp_path / "d")))


def test_an_epoch_visits_every_row_once_in_a_seeded_order(data_path):
    data = TokenData(make_config(data_path))
    total = int(data.first_row[-1])
    epoch = torch.cat([data.batch(0, total, first, 1)[0] for first in range(total)])
    tokens = torch.from_numpy(data.train[0].astype(np.int64))
    rows = tokens[:total * 32].view(total, 32)
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, rows.tolist())) and not torch.equal(epoch, rows)
    idx, targets = data.batch(5, 8, 0, 8)
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    for part in (0, 2, 4, 6):  # a rank's slice is the same rows
        assert torch.equal(data.batch(5, 8, part, 2)[0], idx[part:part + 2])
    assert torch.equal(TokenData(make_config(data_path)).batch(5, 8, 0, 8)[0], idx)
    assert not torch.equal(TokenData(make_config(data_path, seed=1)).batch(5, 8, 0, 8)[0], idx)
    assert not torch.equal(data.batch(0, total, 0, total)[0], data.batch(1, total, 0, total)[0])  # the next epoch's order


def test_rows_never_cross_shards(tmp_path):
    foreign(tmp_path, tokens=np.arange(100))
    shards.write_shard(tmp_path / "x_train_000002.bin", np.arange(100, 233))
    data = TokenData(make_config(str(tmp_path), vocab_size=300, train_seq_len=16))
    total = int(data.first_row[-1])
    assert total == 99 // 16 + 132 // 16
    idx, targets = data.batch(0, total, 0, total)
    assert (targets - idx == 1).all() and sorted(idx[:, 0].tolist()) == [16 * i for i in range(6)] + [100 + 16 * i for i in range(8)]


@pytest.mark.parametrize("stride", [0, 8, 5, 32])
def test_val_windows_score_every_target_once(data_path, stride):
    data = TokenData(make_config(data_path, eval_stride=stride))
    scored = []
    tokens = np.concatenate(data.val).astype(np.int64)
    for idx, targets in data.val_windows():
        at = np.flatnonzero(targets >= 0)
        scored += targets[at].tolist()
        if stride and len(scored) > 32:
            assert at[0] >= 32 - stride  # a target sees at least so many tokens
    assert scored == tokens[1:].tolist()


def test_bpb_is_nats_over_the_bytes_of_the_raw_text(data_path):
    """Against the raw text itself and an evaluation one document stream at a time."""
    cfg = make_config(data_path)
    data, share = TokenData(cfg), train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    model = train_gpt.build_model(cfg, data.vocab_size, share.device)
    torch.nn.init.normal_(model.head.weight)
    val_loss, val_bpb = train_gpt.evaluate(model, train_gpt.row_losses, data, share, MemoryLog())
    raw_bytes = sum(len(d.encode()) for d in decode(data_path)["val"])  # equal to the source's texts: see the first test
    tokens = torch.from_numpy(data.val[0].astype(np.int64))
    nats = sum(model(tokens[i:min(i + 32, len(tokens) - 1)][None], tokens[i + 1:i + 33][None]).item() for i in range(0, len(tokens) - 1, 32))
    assert val_loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert val_bpb == pytest.approx(nats / math.log(2) / raw_bytes, rel=1e-5)


def test_sliding_windows_see_more(data_path):
    model, log = train_in_process(make_config(data_path, iterations=80))
    plain = log.curve("val_loss")[-1]
    cfg = make_config(data_path, eval_stride=8)
    data, share = TokenData(cfg), train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    assert train_gpt.evaluate(model, train_gpt.row_losses, data, share, MemoryLog())[0] < plain


def test_val_tokens_limits_the_split(data_path):
    data = TokenData(make_config(data_path, val_tokens=100))
    assert sum((targets >= 0).sum() for _, targets in data.val_windows()) == 99


def test_a_share_of_the_training_documents_and_a_held_out_split(tmp_path):
    """The same share with and without held_out; no text on two sides; the true val documents nowhere where they are held out."""
    texts = [f"document {i} " * (1 + i % 5) for i in range(200)]
    make = lambda name, **subset: prepare(tmp_path / name, "x", lambda: iter(texts), source="s", licence="l", val_fraction=0.05, vocab_size=300, **subset)
    def documents(folder, split):
        meta, tokens = json.loads((folder / "meta.json").read_text()), read_shard(next(folder.glob(f"*_{split}_*.bin"))).tolist()
        encoding, bounds = saved_encoding(folder, meta), [i for i, t in enumerate(tokens) if t == meta["doc_token"]] + [len(tokens)]
        return {encoding.decode(tokens[a + 1:b]) for a, b in zip(bounds, bounds[1:])}
    full, share, held = make("full"), make("share", train_fraction=0.1), make("held", train_fraction=0.1, held_out=True)
    assert documents(full, "val") == documents(share, "val") and len(documents(share, "val")) == len(documents(held, "val")) == 10
    assert documents(share, "train") == documents(held, "train") < documents(full, "train") and len(documents(share, "train")) == 19
    assert not documents(held, "val") & (documents(full, "val") | documents(share, "train")) and documents(held, "val") < documents(full, "train")
    with pytest.raises(SystemExit, match="200 documents, too few to hold 10 out; lower --train-fraction"):
        make("none", held_out=True)
