"""Shards, tokenizers, rows of text and bits per byte: what data/ writes is what a run reads."""

import base64
import itertools
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
from conftest import MemoryLog, make_config, make_run, shake, texts, train_in_process, train_run
from data import prepare_fineweb, prepare_stdlib, prepare_text
from nanojepa import corpora, records, shards
from nanojepa.batches import TokenData
from nanojepa.packing import Batch, tree_mask
from nanojepa.shards import prepare, read_shard, write_shard
from nanojepa.tokenizer import GPT2_PATTERN, load_tokenizer, make_encoding, token_bytes

BYTES = [bytes([byte]) for byte in range(256)]


def meta_of(folder):
    return json.loads((Path(folder) / "meta.json").read_text())


def decode(folder):
    """{split: documents} of a data folder, by the bytes of the tokens."""
    table = token_bytes(load_tokenizer(str(Path(folder) / "tokenizer.tiktoken")))
    marker = meta_of(folder)["doc_token"]
    documents = {}
    for split in ("train", "val"):
        files = sorted(Path(folder).glob(f"*_{split}_*.bin"))
        tokens = np.concatenate([read_shard(file) for file in files])
        pieces = np.split(tokens, np.flatnonzero(tokens == marker))[1:]
        documents[split] = [b"".join(table[t] for t in piece[1:]).decode() for piece in pieces]
    return documents


def everything(folder):
    return sorted(sum(decode(folder).values(), []))


def ranks_file(path, merges=(), first=256):
    """A file of ranks: all bytes, and merges from rank `first` on."""
    ranks = dict(
        zip([*BYTES, *merges], [*range(256), *range(first, first + len(merges))], strict=True)
    )
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in ranks.items()))
    return path


def json_file(path, *objects):
    path.write_text("".join(json.dumps(obj) + "\n" for obj in objects))
    return path


# ---- what is written


def test_shards_hold_the_texts_byte_for_byte_marked_and_split_by_document(data_path):
    documents, meta = decode(data_path), meta_of(data_path)
    assert everything(data_path) == sorted(texts() * 4)
    assert documents["val"] and not set(documents["train"]) & set(documents["val"])
    assert meta["vocab_size"] == len(meta["bytes_per_token"]) == 300
    assert meta["bytes_per_token"][meta["doc_token"]] == 0


def test_a_full_shard_is_followed_by_another_and_no_document_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    origin = dict(source="s", licence="l")
    prepare(
        tmp_path / "out", "x", lambda: iter(texts()), **origin, val_fraction=0.2, vocab_size=300
    )
    files = sorted((tmp_path / "out").glob("*_train_*.bin"))
    assert len(files) > 2 and all(read_shard(f)[0] == 299 for f in files)
    assert everything(tmp_path / "out") == sorted(texts())


def test_one_document_gives_its_last_tenth_and_line_ends_keep_their_bytes(tmp_path):
    book = "".join(f"Chapter {i}:\r\nit was a dark night.\n" for i in range(200))
    (tmp_path / "book.txt").write_bytes(book.encode())
    source, out = str(tmp_path / "book.txt"), str(tmp_path / "out")
    prepare_text.main(["--source", source, "--vocab-size", "280", "--out", out])
    cut = int(len(book) * 0.9)
    assert decode(out) == {"train": [book[:cut]], "val": [book[cut:]]}


def test_text_with_separator_and_jsonl_and_a_dataset_from_disk(tmp_path):
    (tmp_path / "a.txt").write_text("<sep>".join(texts()[:20]))
    lines = json_file(tmp_path / "a.jsonl", *({"body": text} for text in texts()[:20]))
    (tmp_path / "hub").mkdir()  # a folder that datasets can load as it loads the hub's
    shutil.copy(lines, tmp_path / "hub" / "train.jsonl")
    common = ["--vocab-size", "300", "--val-fraction", "0.2"]
    for source, out, *flags in (
        ("a.txt", "o1", "--separator", "<sep>"),
        ("a.jsonl", "o2", "--field", "body"),
        ("hub", "o3", "--field", "body", "--documents", "10"),
    ):
        place = ["--source", str(tmp_path / source), "--out", str(tmp_path / out)]
        prepare_text.main([*place, *flags, *common])
    assert decode(tmp_path / "o1") == decode(tmp_path / "o2")
    assert everything(tmp_path / "o1") == sorted(texts()[:20])
    assert everything(tmp_path / "o3") == sorted(texts()[:10])
    with pytest.raises(SystemExit, match="^error: --field text: .*hub has the columns body$"):
        prepare_text.main(["--source", str(tmp_path / "hub"), "--out", "x", *common])


def test_a_file_of_ranks_is_a_tokenizer_gaps_or_not(tmp_path):
    """p50k_base has gaps among its ranks too."""
    ranks = ranks_file(tmp_path / "r.tiktoken", [b" t", b"he"])
    source = str(json_file(tmp_path / "a.jsonl", *({"text": text} for text in texts())))
    out = str(tmp_path / "out")
    prepare_text.main(["--source", source, "--tokenizer", str(ranks), "--out", out])
    assert (meta_of(out)["vocab_size"], meta_of(out)["doc_token"]) == (259, 258)
    assert everything(out) == sorted(texts())
    gaps = load_tokenizer(str(ranks_file(tmp_path / "gaps.tiktoken", [b"th"], first=260)))
    assert gaps.encode_ordinary("the") == [260, 101] and gaps.eot_token == 261


def test_stdlib_is_real_text_without_tests_and_repeats():
    first = list(corpora.stdlib_documents())
    assert len(first) > 200 and sum(map(len, first)) > 5_000_000
    assert first == list(corpora.stdlib_documents())
    assert any("class Random(" in text for text in first)
    assert not any("class RegressionTests(unittest.TestCase)" in text for text in first)


def test_the_script_of_the_standard_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "stdlib_documents", lambda: iter(texts()))
    prepare_stdlib.main(["--vocab-size", "300", "--out", str(tmp_path / "out")])
    assert everything(tmp_path / "out") == sorted(texts())
    assert f"DATA_PATH={tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: --train-fraction 1.5: must lie above 0 and at"):
        prepare_stdlib.main(["--train-fraction", "1.5", "--out", str(tmp_path / "o")])


def test_fineweb_fetches_what_is_missing_and_writes_meta(tmp_path, monkeypatch):
    """The hub is replaced by a folder of its files; names, resuming and meta.json are real."""
    fetched = []

    def hf_hub_download(repository, name, repo_type, local_dir):
        fetched.append(name)
        assert (repository, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        write_shard(Path(local_dir) / name, np.random.default_rng(0).integers(0, 50257, 3000))

    ranks = {token: n for n, token in enumerate(BYTES + [b"%05d" % i for i in range(50_000)])}
    gpt2, hub = make_encoding("gpt2", GPT2_PATTERN, ranks), types.SimpleNamespace()
    hub.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(prepare_fineweb, "load_tokenizer", lambda name: gpt2)
    folder = tmp_path / "fw"
    folder.mkdir()
    for count in ("1", "2"):
        prepare_fineweb.main(["--shards", count, "--out", str(folder)])
    train = ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert fetched == ["fineweb_val_000000.bin", *train]
    data = TokenData(make_config(str(folder)))
    assert (data.vocab_size, data.doc_token, len(data.train)) == (50257, 50256, 2)
    (folder / train[0]).write_bytes((folder / train[0]).read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="sha256"):
        TokenData(make_config(str(folder)))
    hub.hf_hub_download = None  # raises when it is called
    with pytest.raises(
        SystemExit, match="^error: fineweb_train_000003.bin of .* cannot be fetched"
    ):
        prepare_fineweb.main(["--shards", "3", "--out", str(folder)])


BAD_SOURCES = [
    (["--source", "D/missing.jsonl", "--vocab-size", "300"], "missing.jsonl"),
    (["--source", "D/no/such_dataset", "--vocab-size", "300"], "neither a file nor a dataset"),
    (
        ["--source", "D/bad.jsonl", "--vocab-size", "300"],
        "bad.jsonl, line 2: no row with a text in the field 'text'",
    ),
    (
        ["--source", "D/number.jsonl", "--vocab-size", "300"],
        "number.jsonl, line 1: no row with a text",
    ),
    (["--source", "D/half.jsonl", "--vocab-size", "300"], "half.jsonl, line 1"),
    (["--source", "D/empty.txt", "--vocab-size", "300"], "holds no text"),
    (
        ["--source", "D/latin.txt", "--vocab-size", "300"],
        "latin.txt, line 1: not UTF-8 at its byte 2",
    ),
    (["--source", "D/ok.txt", "--vocab-size", "100000"], "--vocab-size 100000"),
    (["--source", "D/ok.txt", "--vocab-size", "100"], "--vocab-size 100"),
    (["--source", "D/ok.txt", "--tokenizer", "gpt9"], "neither a file of ranks nor one of"),
    (["--source", "D/ok.txt", "--tokenizer", "D/ok.txt"], "ok.txt, line 1"),
    (["--source", "D/ok.txt", "--tokenizer", "D/big.tiktoken"], "at most 65536"),
    (["--source", "D/ok.txt", "--tokenizer", "D/holes.tiktoken"], "no rank for the byte 101"),
    (["--source", "D/ok.txt", "--vocab-size", "300", "--val-fraction", "1"], "between 0 and 1"),
]


@pytest.mark.parametrize("flags, message", BAD_SOURCES)
def test_bad_sources_are_one_line_and_leave_nothing_half_made(tmp_path, flags, message):
    files = {
        "bad.jsonl": b'{"text": "a"}\n{"test": "b"}\n',
        "number.jsonl": b'{"text": 3}\n',
        "half.jsonl": b'{"text": "\\ud800"}\n',
        "empty.txt": b"",
        "latin.txt": b"a\xe9 b",
        "ok.txt": b"some text of one document",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    if "D/big.tiktoken" in flags:
        ranks_file(tmp_path / "big.tiktoken", [b"%05d!" % i for i in range(65536)])
    holes = ranks_file(tmp_path / "holes.tiktoken")
    holes.write_bytes(holes.read_bytes().replace(b"ZQ== 101\n", b""))  # no e
    flags = [flag.replace("D/", f"{tmp_path}/") for flag in flags]
    with pytest.raises(SystemExit) as error:
        prepare_text.main([*flags, "--out", str(tmp_path / "out")])
    said = str(error.value)
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("flags", [[], ["--tokenizer", "gpt2", "--vocab-size", "300"]])
def test_either_a_tokenizer_or_a_size_is_given(flags, capsys):
    with pytest.raises(SystemExit):
        prepare_text.main(["--source", "x", "--out", "y", *flags])
    assert "--tokenizer" in capsys.readouterr().err


def test_what_fails_halfway_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_meta", full)
    example = records.Record(1, "pairs", None, ["a", "b"])
    origin = dict(source="", licence="", vocab_size=270)
    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "out", "x", lambda: iter(texts()), val_fraction=0.2, **origin)
    with pytest.raises(OSError, match="No space"):
        records.prepare_pairs(tmp_path / "out", [example], [example], **origin)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.txt").write_text("text")
    source, out = str(tmp_path / "a.txt"), str(tmp_path / "out")
    with pytest.raises(SystemExit, match="^error: .*out exists: remove it"):
        prepare_text.main(["--source", source, "--vocab-size", "300", "--out", out])
    assert not list((tmp_path / "out").iterdir())


def test_a_share_of_the_training_documents_and_a_held_out_split(tmp_path):
    """held_out keeps the share; the true val documents are nowhere in its folder."""
    documents = [f"document {i} " * (1 + i % 5) for i in range(200)]

    def make(name, **subset):
        origin = dict(source="s", licence="l", val_fraction=0.05, vocab_size=300)
        folder = prepare(tmp_path / name, "x", lambda: iter(documents), **origin, **subset)
        return {split: set(held) for split, held in decode(folder).items()}

    full, share = make("full"), make("share", train_fraction=0.1)
    held = make("held", train_fraction=0.1, held_out=True)
    assert full["val"] == share["val"] and len(full["val"]) == len(held["val"]) == 10
    assert share["train"] == held["train"] < full["train"] and len(share["train"]) == 19
    assert held["val"] < full["train"] and not held["val"] & (full["val"] | share["train"])
    assert meta_of(tmp_path / "held")["source"] == (
        "s, 0.1 of the training documents, validated on others of them"
    )
    with pytest.raises(ValueError, match="200 documents, too few to hold 10 out; lower --train-f"):
        make("none", held_out=True)


# ---- what is read


def foreign(folder, tokens=(0, 1, 2, 3) * 100, val=(4, 5, 6) * 50):
    """Shards of another project: no meta.json."""
    write_shard(folder / "x_train_000001.bin", np.array(tokens))
    write_shard(folder / "x_val_000000.bin", np.array(val))
    return str(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b"\0" + b[1:], "not a token shard"),
        (lambda b: b[:4] + b"\2" + b[5:], "not a token shard"),
        (lambda b: b[:-2], "it was cut off"),
        (lambda b: b + b"\0\0", "it was cut off"),
        (lambda b: b[:100], "not a token shard"),
        (lambda b: b"", "not a token shard"),
        (lambda b: b[:8] + bytes(1016), "promises 0 tokens"),
        (lambda b: b[:-2] + b"\1\1", "sha256"),
    ],
)
def test_damaged_shards_are_named(tmp_path, data_path, change, message):
    shutil.copytree(data_path, tmp_path / "d")
    shard = next((tmp_path / "d").glob("*_train_*.bin"))
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(ValueError, match=f"{shard.name}.*{message}|{message}.*{shard.name}") as e:
        TokenData(make_config(str(tmp_path / "d")))
    assert "\n" not in str(e.value)


def test_foreign_shards(tmp_path):
    folder = foreign(tmp_path)
    with pytest.raises(ValueError, match="no meta.json: set TOKENIZER .* or VOCAB_SIZE"):
        TokenData(make_config(folder))
    with pytest.raises(ValueError, match="token 6 is outside the vocabulary of 5"):
        TokenData(make_config(folder, vocab_size=5))
    data = TokenData(make_config(folder, vocab_size=300))
    assert data.bytes_per_token is None and "no val_bpb" in data.warnings[0]
    assert data.doc_token == 50256
    ranks = ranks_file(tmp_path / "r.tiktoken", [b"abc"])
    data = TokenData(make_config(folder, tokenizer=str(ranks), doc_token=257))
    assert data.vocab_size == 258 and data.bytes_per_token.tolist() == [1] * 256 + [3, 0]
    # A row without a marker is one document.
    log = train_in_process(folder, vocab_size=300, jepa_lambda=0.1, iterations=2)
    assert log.rows[-1][1]["val_bpb"] is None and log.curve("jepa_loss")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_files(tmp_path, split):
    folder = foreign(tmp_path)
    next(tmp_path.glob(f"*_{split}_*.bin")).unlink()
    with pytest.raises(ValueError, match=rf"no \*_{split}_\*.bin"):
        TokenData(make_config(folder, vocab_size=300))


def test_the_last_train_or_val_in_a_name_is_the_split(tmp_path):
    source, out = tmp_path / "wiki_train_val_set.txt", tmp_path / "out"
    source.write_text("a text of one document " * 50)
    prepare_text.main(["--source", str(source), "--vocab-size", "270", "--out", str(out)])
    data = TokenData(make_config(str(out)))
    assert len(data.train) == len(data.val) == 1 and len(data.train[0]) > len(data.val[0])


def test_other_bad_data(tmp_path, data_path):
    for path, settings, message in (
        (data_path, {"val_tokens": 1}, "VAL_TOKENS=1"),
        ("/nowhere", {}, "DATA_PATH=/nowhere: no such folder"),
        (data_path, {"train_seq_len": 100_000}, "the val split .* lower TRAIN_SEQ_LEN"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenData(make_config(path, **settings))
    folder = Path(shutil.copytree(data_path, tmp_path / "d"))
    next(folder.glob("*_val_*.bin")).rename(folder / "other_val_000000.bin")
    with pytest.raises(ValueError, match="disagree on other_val_000000.bin, tiny_val_000000.bin"):
        TokenData(make_config(str(folder)))
    meta = meta_of(folder)
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="meta.json: its last key is not the sha256 .*; remove"):
        TokenData(make_config(str(folder)))


# ---- rows and windows


def test_an_epoch_visits_every_row_once_in_a_seeded_order(data_path):
    data = TokenData(make_config(data_path))
    total = data.num_rows
    epoch = torch.cat([data.rows(0, total, first, 1)[0] for first in range(total)])
    tokens = torch.from_numpy(data.train[0].astype(np.int64))
    in_order = tokens[: total * 32].view(total, 32)
    assert sorted(epoch.tolist()) == sorted(in_order.tolist()) and not torch.equal(epoch, in_order)
    idx, targets = data.rows(5, 8, 0, 8)
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    for first in (0, 2, 4, 6):  # a rank's slice is the same rows
        assert torch.equal(data.rows(5, 8, first, 2)[0], idx[first : first + 2])
    assert torch.equal(TokenData(make_config(data_path)).rows(5, 8, 0, 8)[0], idx)
    assert not torch.equal(TokenData(make_config(data_path, seed=1)).rows(5, 8, 0, 8)[0], idx)
    assert not torch.equal(data.rows(1, total, 0, total)[0], epoch)  # the next epoch's order


def test_rows_never_cross_shards(tmp_path):
    folder = foreign(tmp_path, tokens=np.arange(100))
    write_shard(tmp_path / "x_train_000002.bin", np.arange(100, 233))
    data = TokenData(make_config(folder, vocab_size=300, train_seq_len=16))
    total = data.num_rows
    assert total == 99 // 16 + 132 // 16
    idx, targets = data.rows(0, total, 0, total)
    starts = [16 * i for i in range(6)] + [100 + 16 * i for i in range(8)]
    assert (targets - idx == 1).all() and sorted(idx[:, 0].tolist()) == starts


def val_rows(run):
    """(idx, targets) of every row of the val split."""
    for _, batch in run.data.val_batches(run.share):
        yield from zip(batch.idx, batch.targets, strict=True)


@pytest.mark.parametrize("stride", [0, 8, 5, 32])
def test_val_windows_score_every_target_once(data_path, stride):
    run = make_run(data_path, eval_stride=stride)
    whole, scored = np.concatenate(run.data.val).astype(np.int64), []
    for row, (idx, targets) in enumerate(val_rows(run)):
        places = torch.nonzero(targets >= 0).flatten()
        scored += targets[places].tolist()
        if row * (stride or 32) > 32 and len(places):
            assert not stride or places[0] >= 32 - stride  # a target sees at least so many tokens
        for place in places.tolist():
            seen = whole[len(scored) - len(places) : len(scored)][: place + 1]
            assert idx[place] == seen[place - places[0]]
    assert scored == whole[1:].tolist()


def test_val_tokens_limits_the_split(data_path):
    run = make_run(data_path, val_tokens=100)
    assert sum((targets >= 0).sum() for _, targets in val_rows(run)) == 99


def test_bpb_is_nats_over_the_bytes_of_the_raw_text(data_path):
    """Against the raw text itself, and an evaluation of one row at a time."""
    run = make_run(data_path)
    torch.nn.init.normal_(run.model.head.weight)
    scores = train_gpt.evaluate(run, MemoryLog())
    raw_bytes = sum(len(text.encode()) for text in decode(data_path)["val"])
    tokens = torch.from_numpy(run.data.val[0].astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for i in range(0, len(tokens) - 1, 32):
            end = min(i + 32, len(tokens) - 1)
            batch = Batch(tokens[None, i:end], tokens[None, i + 1 : end + 1])
            nats += train_gpt.row_losses(run.model, batch).item()
    assert scores.val_loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert scores.val_bpb == pytest.approx(nats / math.log(2) / raw_bytes, rel=1e-5)


def test_masked_documents_do_not_see_each_other(data_path):
    """The losses of a row are those of its documents alone, in training and in evaluation."""
    run = shake(make_run(data_path, mask_documents=True))
    (step, *_), (_, val) = (
        run.data.load(0, run.share).batches,
        next(run.data.val_batches(run.share)),
    )
    fragments = 0
    for batch in (step, val):
        ends, x = batch.ends, run.model._run_blocks(batch.idx, -1, mask=tree_mask(batch.ends))[0]
        losses = run.model.token_losses(x, batch.targets)
        for row in range(len(batch.idx)):
            starts = [n for n, token in enumerate(batch.idx[row]) if token == run.data.doc_token]
            for start, end in itertools.pairwise(sorted({0, *starts, batch.idx.size(1)})):
                assert ends[row, start:end].unique().tolist() == [end]
                alone = slice(row, row + 1), slice(start, end)
                x, _ = run.model._run_blocks(batch.idx[alone], -1)
                expected = run.model.token_losses(x, batch.targets[alone])
                torch.testing.assert_close(losses[alone], expected, rtol=1e-4, atol=1e-4)
                fragments += 1
    assert fragments > 2 * len(step.idx)
    assert make_run(data_path).data.load(0, run.share).batches[0].ends is None


def test_sliding_windows_see_more(data_path):
    run = make_run(data_path, iterations=60)
    plain = train_run(run).curve("val_loss")[-1]
    run.data = TokenData(make_config(data_path, eval_stride=8))
    assert train_gpt.evaluate(run, MemoryLog()).val_loss < plain
