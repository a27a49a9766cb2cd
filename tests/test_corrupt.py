"""Damaged and hostile files: every byte that changes is found before anything is trained on, and named in one line."""
import dataclasses
import json
import os
import re
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import loader
import train_gpt
import weights
from conftest import ROOT, make_config
from config import read_yaml
from data import pairs, shards, text
from data.shards import json_lines, read_sealed, write_sealed, write_whole

MUTATIONS = 60  # of each file
REFUSED = (ValueError, SystemExit)


# ---- every file that a script here writes


def foreign(folder, name="x"):
    """The config of a folder of shards without meta.json, written here."""
    for split in ("train", "val"):
        shards.write_shard(folder / f"{name}_{split}_000000.bin", np.arange(900) % 250)
    return make_config(str(folder))


def tiny_model():
    return train_gpt.build_model(make_config("", num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1), 64, torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_path, folders):
    """Folders text, pairs, groups, foreign, run with all files as they are written."""
    base = tmp_path_factory.mktemp("corrupt")
    shutil.copytree(data_path, base / "text")
    for kind, folder in folders.items():
        shutil.copytree(folder, base / kind)
    (base / "foreign").mkdir()
    loader.open_data(foreign(base / "foreign"))  # the first use
    (base / "run").mkdir()
    (base / "run" / "model.safetensors").write_bytes(weights.to_safetensors(tiny_model().state_dict()))
    return base


FILES = ["text/meta.json", "text/tiny_train_000000.bin", "text/tiny_val_000000.bin", "text/tokenizer.tiktoken", "pairs/meta.json", "pairs/pairs_train_000000.bin",
         "pairs/pairs_val_000000.bin", "pairs/tokenizer.tiktoken", "groups/pairs_train_000000.bin", "foreign/x_train_000000.bin", "foreign/x_train_000000.bin.sha256",
         "run/model.safetensors"]


def load(folder):
    """What a run reads of a folder before it trains."""
    if folder.name == "run":
        return weights.load_weights(tiny_model(), folder)
    return loader.open_data(make_config(str(folder)))


def mutations(content):
    """Changed copies of some bytes: one byte, a cut, a piece lost, put in, appended or zeroed, two bytes swapped."""
    at = st.integers(0, 2**32 - 1).map(lambda n: n * 0x9E3779B1 % 2**32 * len(content) >> 32)  # anywhere: hypothesis prefers small numbers
    xor, piece = st.integers(1, 255) | st.sampled_from([1 << n for n in range(8)]), st.binary(min_size=1, max_size=9)
    end = st.tuples(at, at).map(lambda ab: (min(ab), max(ab) + 1))

    def swapped(ab):
        changed = bytearray(content)
        changed[ab[0]], changed[ab[1]] = content[ab[1]], content[ab[0]]
        return bytes(changed)
    return st.one_of(
        st.builds(lambda i, x: content[:i] + bytes([content[i] ^ x]) + content[i + 1:], at, xor), at.map(lambda i: content[:i]),
        end.map(lambda ab: content[:ab[0]] + content[ab[1]:]), st.builds(lambda i, new: content[:i] + new + content[i:], at, piece),
        piece.map(lambda new: content + new), end.map(lambda ab: content[:ab[0]] + bytes(ab[1] - ab[0]) + content[ab[1]:]),
        st.tuples(at, at).map(swapped)).filter(lambda changed: changed != content)


@pytest.mark.parametrize("name", FILES)
def test_no_mutation_is_silent(base, name):
    path, seen = base / name, set()
    content = path.read_bytes()
    load(path.parent)  # whole, it is read

    @settings(max_examples=MUTATIONS, derandomize=True, deadline=None, database=None)
    @given(mutations(content))
    def refused(changed):
        seen.add(changed)
        path.write_bytes(changed)
        with pytest.raises(REFUSED) as e:
            load(path.parent)
        assert path.name in str(e.value) and "\n" not in str(e.value), e.value

    try:
        refused()
    finally:
        path.write_bytes(content)
    load(path.parent)
    assert len(seen) >= 50  # of 12 files: at least 600 in all


def test_every_bit_of_a_sealed_file_and_of_weights_counts(tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.zeros(2).bfloat16(), "none": torch.zeros(0, 3)}
    write_sealed(tmp_path / "x.json", {"steps": 3, "name": "é", "none": {}})
    for path, read in ((tmp_path / "x.json", read_sealed), (None, lambda blob: weights.from_safetensors(blob, sealed=True))):
        content = bytearray(path.read_bytes() if path else weights.to_safetensors(state))
        for n in range(8 * len(content)):
            content[n // 8] ^= 1 << n % 8
            if path:
                path.write_bytes(content)
            with pytest.raises(ValueError):
                read(path or bytes(content))
            content[n // 8] ^= 1 << n % 8
        if path:
            path.write_bytes(content)
        assert read(path or bytes(content)).keys() == ({"steps", "name", "none"} if path else state.keys())


def test_a_damaged_artifact_is_refused_or_the_same():
    """zlib checks what it gives, not its own padding: what is not refused is the same tensors."""
    state = {"w": torch.randn(40, 64), "g": torch.ones(8)}
    artifact = weights.quantize(state)
    whole, refused = weights.dequantize(artifact), []

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(mutations(artifact))
    def check(changed):
        try:
            found = weights.dequantize(changed)
        except ValueError:
            refused.append(changed)
        else:
            assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    check()
    assert len(refused) > 60
    for n in (1, 8, len(artifact) // 2, len(artifact) - 1):
        with pytest.raises(ValueError, match="damaged artifact"):
            weights.dequantize(artifact[:n])
    with pytest.raises(ValueError, match="added to"):
        weights.dequantize(artifact + b"x")


@pytest.mark.parametrize("tensors", [
    {"w": torch.ones(4, 6).to(torch.int8)}, {"w": torch.ones(4, 6).to(torch.int8), "w.scale": torch.ones(3, 1).half()}, {"w": torch.ones(4, 4).to(torch.int8), "w.scale": torch.ones(1, 4).half()},
    {"w": torch.ones(6).to(torch.int8), "w.scale": torch.ones(6, 1).half()}, {"w": torch.ones(()).to(torch.int8), "w.scale": torch.ones(()).half()}])
def test_int8_without_its_scale_is_a_damaged_artifact(tensors):
    with pytest.raises(ValueError, match="a damaged artifact .*'w' is int8") as e:
        weights.dequantize(zlib.compress(weights.to_safetensors(tensors, seal=False)))
    assert "\n" not in str(e.value)


# ---- sealed JSON and files that appear whole


def test_what_is_sealed_is_read_again_and_nothing_else_is(tmp_path):
    path = tmp_path / "x.json"
    for value in ({}, {"a": [1, 2.5, None, "é\n"], "b": {"sha256": "inner"}}):
        write_sealed(path, value)
        assert read_sealed(path) == value and list(json.loads(path.read_text()))[-1] == "sha256"
    assert list(tmp_path.iterdir()) == [path]  # no temporary file
    with pytest.raises(ValueError, match="nowhere.json: cannot be read"):
        read_sealed(tmp_path / "nowhere.json")
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="x.json: its last key is not the sha256"):
        read_sealed(path)
    for body in (b'[1, ', b'{"a": ' + b"[" * 100_000, b'{"a": \xff, ', b'{"a": ' + b"1" * 5000 + b", "):  # sealed all the same
        path.write_bytes(body + shards.seal_of(body))
        with pytest.raises(ValueError, match="x.json: not a JSON object") as e:
            read_sealed(path)
        assert "\n" not in str(e.value)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x"
    write_whole(path, b"old")

    def chunks():
        yield b"half of the new"
        raise OSError(28, "No space left on device")
    for write in (lambda: write_whole(path, b"half", 3), lambda: write_whole(path, *chunks()), lambda: write_whole(tmp_path / "no" / "x", b"new")):
        with pytest.raises((OSError, TypeError)):
            write()
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---- what meta.json may say


def change_meta(folder, change):
    """Seal a changed meta.json, as somebody would who wants to do harm."""
    meta = read_sealed(folder / "meta.json")
    change(meta)
    write_sealed(folder / "meta.json", meta)


@pytest.mark.parametrize("kind, keys, value", [
    *(("text", ["vocab_size"], v) for v in (0, -1, 300.0, "300", None, True, 10**9, [])), *(("text", ["doc_token"], v) for v in (-1, 300, 1.5, None, "1", [1], True)),
    *(("text", ["bytes_per_token"], v) for v in ([], [1], None, [1.0] * 300, [-1] * 300, ["1"] * 300, [10**30] * 300, {"a": 1})),
    *(("text", ["tokenizer"], v) for v in (None, [], "tokenizer.tiktoken")),
    *(("text", ["tokenizer", "file"], v) for v in ("../text/tokenizer.tiktoken", "/etc/passwd", "..", ".", "", None, 5, "a/b", "a\\b", "a\0b", ["x"])),
    *(("text", ["tokenizer", "sha256"], v) for v in (None, "", "ab", 5, "A" * 64)), ("text", ["tokenizer", "pattern"], None), ("text", ["tokenizer", "name"], 3),
    *(("text", ["shards"], v) for v in (None, [], {}, {"tiny_train_000000.bin": None}, {"tiny_train_000000.bin": {}}, {"tiny_train_000000.bin": {"sha256": 5}})),
    ("text", ["shards", "../x_train_1.bin"], {"sha256": "0" * 64}), ("text", ["kind"], "pears"), ("text", ["kind"], None), ("text", ["kind"], ["pairs"]),
    *(("pairs", ["separator"], v) for v in (-1, 10**6, None, "1", 1.0, True)), *(("pairs", ["first_pred"], v) for v in (-1, 0, 10**6, None, "9")),
    ("pairs", ["keep_system"], "no"), ("pairs", ["kind"], "text"), ("pairs", ["kind"], {})])
def test_impossible_values_are_one_line_that_names_the_key(base, tmp_path, kind, keys, value):
    folder = Path(shutil.copytree(base / kind, tmp_path / kind))

    def change(meta):
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = value
    change_meta(folder, change)
    with pytest.raises(ValueError, match=rf"meta\.json.*({keys[0]}|shards beside it disagree)") as e:
        loader.open_data(make_config(str(folder)))
    assert "\n" not in str(e.value)


def test_a_missing_key_and_a_pattern_that_is_none_are_one_line(base, tmp_path):
    for key in shards.META:
        folder = Path(shutil.copytree(base / "text", tmp_path / key))
        change_meta(folder, lambda meta: meta.pop(key))
        with pytest.raises(ValueError, match=rf"meta\.json: {key} is not"):
            loader.open_data(make_config(str(folder)))
    folder = Path(shutil.copytree(base / "text", tmp_path / "pattern"))
    change_meta(folder, lambda meta: meta["tokenizer"].update(pattern="(("))
    with pytest.raises(ValueError, match=r"meta\.json: its tokenizer has no pattern") as e:
        shards.saved_encoding(folder, shards.read_meta(folder))
    assert "\n" not in str(e.value)


def test_the_sum_of_the_data_stays_what_it_was(tmp_path):
    """data_sha256 stands in committed records: the same data must have the same one in every version."""
    cfg, table = foreign(tmp_path), [bytes([i]) for i in range(256)] + [b""]
    found = {f.name: {"sha256": shards.sha256_file(f), "tokens": 900} for f in tmp_path.glob("*.bin")}
    shards.write_ranks(tmp_path / "r.tiktoken", table)
    shards.write_meta(tmp_path, tokenizer={"file": "r.tiktoken", "name": "bytes", "pattern": "."}, table=table, doc_token=256, shards=found, source="s", licence="l")
    assert loader.open_data(cfg).sha256 == "83f8b930f54b66d8381d65a06f84f83f52638b0f8017703b14d7613ed2d9b19a"


@pytest.mark.parametrize("line", [b"YQ==", b"YQ== x", b"YQ== -1", b"YQ== 99999999999", b"YQ== " + b"9" * 5000, b"YQ== 0\nYQ== 1", b"YQ== 0\nYg== 0", b"\xff 1", b"==== 1"])
def test_bad_ranks_are_one_line(tmp_path, line):
    (tmp_path / "r.tiktoken").write_bytes(line + b"\n")
    for read in (shards.read_ranks, shards.token_table, shards.load_tokenizer):
        with pytest.raises(SystemExit, match=r"error: .*r\.tiktoken") as e:
            read(str(tmp_path / "r.tiktoken"))
        assert "\n" not in str(e.value)


# ---- shards of other projects


def test_foreign_shards_are_held_to_their_first_use(tmp_path):
    cfg = foreign(tmp_path)
    data, beside, shard = loader.open_data(cfg), tmp_path / "x_train_000000.bin.sha256", tmp_path / "x_train_000000.bin"
    assert beside.read_text() == f"{shards.sha256_file(shard)}  {shard.name}\n" and data.warnings == [] and data.sha256 is None
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".bin", ".sha256", ".sha256"] and len(loader.open_data(cfg).train) == 1
    shards.write_shard(shard, np.arange(900) % 249)  # whole, but another
    with pytest.raises(ValueError, match=f"{re.escape(str(shard))}: its sha256 is not the one .* in {re.escape(str(beside))}; fetch it again, or remove that file"):
        loader.open_data(cfg)
    beside.unlink()
    assert loader.open_data(cfg).warnings == []
    for make in (lambda: beside.symlink_to(tmp_path / "nowhere"), beside.mkdir):
        beside.unlink()
        make()
        with pytest.raises(ValueError, match=f"{re.escape(str(beside))}: not a file with the sha256 of .*; remove it"):
            loader.open_data(cfg)


def test_the_tokenizer_of_foreign_shards_is_held_too(tmp_path):
    shards.write_ranks(tmp_path / "r", [bytes([i]) for i in range(256)])
    ranks = (tmp_path / "r").rename(tmp_path / ("r" * 246 + ".tiktoken"))  # no room for a longer name
    (tmp_path / "f").mkdir()
    cfg = foreign(tmp_path / "f")
    (warning,) = loader.open_data(dataclasses.replace(cfg, tokenizer=str(ranks))).warnings
    assert re.fullmatch(f"{re.escape(str(tmp_path))} cannot be written \\(File name too long\\), so the sha256 of r*.tiktoken is not kept.*", warning)
    ranks = ranks.rename(tmp_path / "r.tiktoken")
    cfg = dataclasses.replace(cfg, tokenizer=str(ranks))
    assert loader.open_data(cfg).warnings == [] == loader.open_data(cfg).warnings and (tmp_path / "r.tiktoken.sha256").is_file()
    shards.write_ranks(ranks, [bytes([i]) for i in range(255)] + [b"a longer one"])
    with pytest.raises(ValueError, match=f"{re.escape(str(ranks))}: its sha256 is not the one it had when it was first used"):
        loader.open_data(cfg)


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_data_that_has_lost_its_meta_is_not_taken_for_another_project_s(base, tmp_path, kind):
    folder = Path(shutil.copytree(base / kind, tmp_path / kind))
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match=f"{kind}: its meta.json is missing; remove the folder and make the data again"):
        loader.open_data(make_config(str(folder)))


def test_a_rank_checks_its_own_shards_and_a_new_one_is_held_too(tmp_path):
    cfg = foreign(tmp_path)
    loader.TokenData(cfg, part=1, parts=2)
    assert [p.name for p in tmp_path.glob("*.sha256")] == ["x_val_000000.bin.sha256"]
    loader.TokenData(cfg, part=0, parts=2)
    shards.write_shard(tmp_path / "x_train_000001.bin", np.arange(900) % 250)
    loader.open_data(cfg)
    assert len(list(tmp_path.glob("*.sha256"))) == 3


def test_where_the_sum_cannot_be_written_a_line_says_so_and_the_run_goes_on(tmp_path):
    cfg = foreign(tmp_path, "x" * 224)  # the file system has no room for a longer name, so it refuses the file beside it
    data = loader.open_data(cfg)
    assert len(data.warnings) == 1 and re.fullmatch(f"{re.escape(str(tmp_path))} cannot be written \\(File name too long\\).*", data.warnings[0])
    assert not list(tmp_path.glob("*.sha256*")) and len(data.train) == 1


# ---- lines of JSON

PAIR = b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": %s}], "task": "exact", "text": %s}'
LONG = shards.LINE_BYTES
LINES = {"long": PAIR % (b'"' + b"a" * LONG + b'"', b'"t"'), "blank but long": b" " * (LONG + 1), "deep": b"[" * 100_000, "deep inside": PAIR % (b"[" * 100_000, b"[" * 100_000),
         "no UTF-8": PAIR % (b'"\xff"', b'"\xff"'), "surrogate as UTF-8": PAIR % (b'"\xed\xa0\x80"', b'"\xed\xa0\x80"'), "NUL": PAIR % (b'"a\0b"', b'"a\0b"'),
         "half a pair": PAIR % (b'"\\ud800"', b'"\\udfff"'), "UTF-16": b"\xff\xfe{\0}\0", "number": PAIR % (b"1e999", b"1e999"), "NaN": PAIR % (b"NaN", b"NaN"),
         "digits": PAIR % (b"1" * 5000, b"1" * 5000), "object": PAIR % (b'{"a": {}}', b"{}"), "cut": PAIR[:40], "list": b"[1]",
         **{f"system {x.decode()}": b'{"messages": [{"role": "system", "content": %s}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "task": "exact"}' % x
            for x in (b"[]", b"{}", b"0", b"false", b"0.0", b'["s"]')}}


@pytest.mark.parametrize("line", LINES.values(), ids=list(LINES))
def test_hostile_lines_are_named_by_number_or_skipped(tmp_path, capsys, line):
    good, path = PAIR % (b'"a"', b'"t"'), tmp_path / "x.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    for read in (pairs.read_jsonl, evaluate.read_tasks, lambda path: list(text.field_of(path, "text")())):
        with pytest.raises(SystemExit, match=r"error: .*x\.jsonl, line 3: ") as e:
            read(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 1000
    assert [n for n, *_ in pairs.read_jsonl(path, "skip")] == [e["line"] for e in evaluate.read_tasks(path, bad="skip")] == [1, 4]
    assert "x.jsonl, line 3: skipped: " in capsys.readouterr().err


def test_a_line_of_10_mb_is_read_and_a_longer_one_is_never_held(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'"' + b"a" * (LONG - 2) + b'"\n"b"\r\n\xef\xbb\xbf"c"')
    assert [(n, len(load())) for n, load in json_lines(path)] == [(1, LONG - 2), (2, 1), (3, 1)]
    path.write_bytes(b'"a"\n{"a key that nobody reads": "\xed\xa0\x80"}\n')
    with pytest.raises(ValueError, match="not JSON .*codec"):
        [load() for _, load in json_lines(path)]
    with open(path, "wb") as f:
        f.truncate(20 * LONG)  # one line of zeros that takes no place on the disk
        f.seek(0, os.SEEK_END)
        f.write(b'\n"last"\n')
    tracemalloc.start()
    (one, bad), (two, good) = json_lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with pytest.raises(ValueError, match="longer than 10,000,000 bytes"):
        bad()
    assert (one, two, good()) == (1, 2, "last") and peak < 4 * LONG


# ---- YAML


@pytest.mark.parametrize("content, message", [
    (b"a: &x [1]\nb: *x", "aliases"), (b"a: &x {k: v}\nb: {<<: *x}", "aliases"), (b"[" * 100_000, "nested"), (b"a: " + b"[" * 5000 + b"]" * 5000, "nested"), (b"- " * 50_000, "nested"), (b"? " * 50_000, "nested"), (b"a: \xff", "x.yaml"),
    (b"a: " + b"9" * 5000, "digits"), (b"a: 2001-99-99", "month"), (b"!!python/object/apply:os.system ['touch made']", "could not determine a constructor"),
    (b"a: !!int ''", "x.yaml"), (b"a: !!bool x", "x.yaml"), (b"a: \0", "x.yaml"), (b"#" * 100_001, "longer than 100,000 bytes"), (b"- a", "lines of `key: value`")])
def test_hostile_yaml_is_one_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"--config .*x\.yaml: .*{message}" if message != "x.yaml" else r"--config .*x\.yaml: ") as e:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(e.value) and [p.name for p in tmp_path.iterdir()] == ["x.yaml"]
    (tmp_path / "x.yaml").rename(tmp_path / "config.yaml")
    assert evaluate.text_settings(tmp_path) == (False, True)  # of a model's folder: as if there were none


# ---- headers of weights


def blob_of(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("blob", [
    b"", b"\1", (2**63).to_bytes(8, "little") + b"{}", (2**40).to_bytes(8, "little") + b"{}", blob_of(b"["), blob_of(b"[" * 100_000), blob_of(b"\xff\xfe"), blob_of([]), blob_of(3), blob_of({"a": 1}),
    blob_of({"a": {}}), *(blob_of({"a": e}, bytes(8)) for e in (
        entry(offsets=(0, 2**60)), entry(offsets=(4, 0)), entry(offsets=(-4, 0)), entry(offsets=(0, 4.0)), entry(offsets=(0,)), entry(offsets=(0, 8)), entry(offsets=(0, 4)), entry(shape=(-1, 2), offsets=(0, 8)),
        entry(shape=(2**62, 2**62), offsets=(0, 8)), entry(shape=("2",), offsets=(0, 8)), entry(shape=(True, 2), offsets=(0, 8)), entry("F64", (1,), (0, 8)), entry("U8", (8,), (0, 8)), entry(["F32"], (2,), (0, 8)),
        entry(None, (2,), (0, 8)), {**entry(shape=(2,), offsets=(0, 8)), "more": 1})),
    blob_of({"a": entry(shape=(0, 2**47, 2**47), offsets=(0, 0))}), blob_of({"a": entry(shape=[1] * 1000)}, bytes(4)), blob_of({"a": entry(), "b": entry()}, bytes(4)),
    blob_of({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), blob_of({"a": entry(offsets=(4, 8))}, bytes(8)), blob_of({"__metadata__": 5, "a": entry()}, bytes(3))])
def test_hostile_headers_of_weights_are_one_line(tmp_path, blob):
    (tmp_path / "model.safetensors").write_bytes(blob)
    tracemalloc.start()
    for read in (lambda: weights.from_safetensors(blob), lambda: weights.from_safetensors(blob, sealed=True), lambda: weights.load_weights(tiny_model(), tmp_path)):
        with pytest.raises(ValueError) as e:
            read()
        assert "\n" not in str(e.value)
    assert "model.safetensors" in str(e.value) and tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_weights_without_a_sum_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(weights.to_safetensors(tiny_model().state_dict(), seal=False))
    with pytest.raises(ValueError, match="model.safetensors: has no sha256, as files of older versions"):
        weights.load_weights(tiny_model(), tmp_path)


# ---- the sources themselves


def test_no_source_unpickles_or_evaluates_what_it_reads():
    unsafe = re.compile(r"\bpickle|\bmarshal\b|\bshelve\b|\bjoblib\b|\bdill\b|allow_pickle|np\.load\(|yaml\.(?:load|full_load|unsafe_load)\b|(?<![\w.])(?:eval|exec)\(|shell=True|os\.system")
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        source = path.read_text()
        assert not (found := unsafe.search(source)), f"{path.name}: {found and found[0]}"
        for call in re.finditer(r"torch\.load\(", source):
            assert "weights_only=True" in source[call.start():call.start() + 200], f"{path.name}: torch.load without weights_only=True"
