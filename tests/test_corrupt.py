"""Damaged and hostile data: every byte that changes is found before anything is trained on."""

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, make_config
from data import prepare_text
from nanojepa import files, readers
from nanojepa.batches import TokenData, open_data
from nanojepa.files import (
    check_seal,
    read_sealed,
    seal_folder,
    sha256_file,
    write_sealed,
    write_whole,
)
from nanojepa.readers import numbered_lines, open_rows, parse_line
from nanojepa.records import read_examples
from nanojepa.shards import write_meta, write_shard
from nanojepa.tokenizer import make_encoding, read_ranks, write_ranks

MUTATIONS = 60  # of each file
BYTES = [bytes([byte]) for byte in range(256)]


def foreign(folder, name="x", **settings):
    """The config of a folder of shards without meta.json, written here."""
    for split in ("train", "val"):
        write_shard(folder / f"{name}_{split}_000000.bin", np.arange(900) % 250)
    return make_config(str(folder), **{"vocab_size": 250, **settings})


@pytest.fixture(scope="module")
def base(tmp_path_factory, data_path, folders):
    """A folder of data folders: text, pairs, groups, and foreign, which has been used once."""
    base = tmp_path_factory.mktemp("corrupt")
    for kind, folder in {"text": data_path, **folders}.items():
        shutil.copytree(folder, base / kind)
    (base / "foreign").mkdir()
    open_data(foreign(base / "foreign"))
    return base


@pytest.fixture
def copy(base, tmp_path):
    """A function that copies a folder of base."""
    return lambda kind, name="copy": Path(shutil.copytree(base / kind, tmp_path / name))


# ---- every byte counts


def mutations(content):
    """Changed copies of some bytes."""
    # Hypothesis prefers small numbers, but a change may fall anywhere.
    place = st.integers(0, 2**32 - 1).map(lambda n: n * 0x9E3779B1 % 2**32 * len(content) >> 32)
    two_places = st.tuples(place, place).map(sorted)
    bits = st.integers(1, 255) | st.sampled_from([1 << n for n in range(8)])
    piece = st.binary(min_size=1, max_size=9)

    def flip(i, bits):
        return content[:i] + bytes([content[i] ^ bits]) + content[i + 1 :]

    def swap(i, j):
        changed = bytearray(content)
        changed[i], changed[j] = content[j], content[i]
        return bytes(changed)

    changed = st.one_of(
        st.builds(flip, place, bits),
        two_places.map(lambda ij: swap(*ij)),
        place.map(lambda i: content[:i]),
        st.builds(lambda i, new: content[:i] + new + content[i:], place, piece),
        st.builds(lambda new: content + new, piece),
        two_places.map(lambda ij: content[: ij[0]] + content[ij[1] + 1 :]),
        two_places.map(lambda ij: content[: ij[0]] + bytes(ij[1] - ij[0]) + content[ij[1] :]),
    )
    return changed.filter(lambda blob: blob != content)


FILES = [
    "text/meta.json",
    "text/tiny_train_000000.bin",
    "text/tiny_val_000000.bin",
    "text/tokenizer.tiktoken",
    "pairs/meta.json",
    "pairs/pairs_train_000000.bin",
    "pairs/pairs_val_000000.bin",
    "pairs/tokenizer.tiktoken",
    "groups/pairs_train_000000.bin",
    "foreign/x_train_000000.bin",
    "foreign/x_train_000000.bin.sha256",
]


@pytest.mark.parametrize("name", FILES)
def test_no_mutation_is_silent(copy, name):
    folder, name = name.split("/")
    path, seen = copy(folder) / name, set()
    vocab_size = 250 if folder == "foreign" else 0
    content, cfg = path.read_bytes(), make_config(str(path.parent), vocab_size=vocab_size)
    open_data(cfg)  # whole, it is read

    @settings(max_examples=MUTATIONS, derandomize=True, deadline=None, database=None)
    @given(mutations(content))
    def refused(changed):
        seen.add(changed)
        path.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            open_data(cfg)
        assert name in str(error.value) and "\n" not in str(error.value)

    refused()
    assert len(seen) >= 50  # of 11 files: more than 500 in all
    path.write_bytes(content)
    open_data(cfg)


def test_every_bit_of_a_sealed_file_counts(tmp_path):
    path, value = tmp_path / "x.json", {"steps": 3, "name": "é", "none": {}}
    write_sealed(path, value)
    content = bytearray(path.read_bytes())
    for n in range(8 * len(content)):
        content[n // 8] ^= 1 << n % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.json"):
            read_sealed(path)
        content[n // 8] ^= 1 << n % 8
    path.write_bytes(content)
    assert read_sealed(path) == value


# ---- files that are sealed, or appear whole


def test_what_is_sealed_is_read_again_and_nothing_else_is(tmp_path):
    path = tmp_path / "x.json"
    for value in ({}, {"a": [1, 2.5, None, "é\n"], "b": {"sha256": "inner"}}):
        write_sealed(path, value)
        assert read_sealed(path) == value
        assert list(json.loads(path.read_text()))[-1] == "sha256"
    assert list(tmp_path.iterdir()) == [path]  # no temporary file
    with pytest.raises(ValueError, match="nowhere.json: cannot be read"):
        read_sealed(tmp_path / "nowhere.json")
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="x.json: its last key is not the sha256"):
        read_sealed(path)
    deep, digits = b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b", "
    for text in (b"[1, ", deep, b'{"a": \xff, ', digits):  # sealed all the same
        path.write_bytes(text + files._seal_of(text))
        with pytest.raises(ValueError, match="x.json: not a JSON object") as error:
            read_sealed(path)
        assert "\n" not in str(error.value)


def test_a_sealed_folder_names_what_is_missing_or_has_changed(tmp_path):
    file = tmp_path / "inner" / "x"
    file.parent.mkdir()
    file.write_text("as it was")
    check_seal(tmp_path)  # of another project: it has no seal
    seal_folder(tmp_path)
    check_seal(tmp_path)
    file.write_text("changed")
    message = "inner/x: missing, or its sha256 is not the one in sha256.json; fetch"
    with pytest.raises(ValueError, match=message):
        check_seal(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=message):
        check_seal(tmp_path)
    (tmp_path / "sha256.json").write_text("{}")
    with pytest.raises(ValueError, match="sha256.json: its last key is not the sha256"):
        check_seal(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x"
    write_whole(path, b"old")

    def chunks():
        yield b"half of the new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, *chunks())
    with pytest.raises(TypeError):
        write_whole(path, b"half", 3)
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no" / "x", b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---- what meta.json may say


# (kind of data, a key of its meta.json, what can't stand there; None is as if it were missing)
IMPOSSIBLE = [
    ("text", "vocab_size", ("300", None, [])),
    ("text", "doc_token", (1.5, None, "1", [1])),
    ("text", "bytes_per_token", (None, {"a": 1})),
    ("text", "tokenizer", (None, [], "tokenizer.tiktoken")),
    ("text", "shards", (None, [], {}, {"../x_train_1.bin": {"sha256": "0" * 64}})),
    ("text", "kind", (None, ["pairs"])),
    ("pairs", "kind", ({},)),
    ("pairs", "separator", (None, "1", 1.0)),
    ("pairs", "first_pred", (None, "9")),
    ("pairs", "keep_system", ("no",)),
]


@pytest.mark.parametrize("kind, key, values", IMPOSSIBLE)
def test_impossible_values_are_one_line_that_names_the_key(copy, kind, key, values):
    """Sealed all the same, as somebody would who wants to do harm."""
    folder = copy(kind)
    for value in values:
        write_sealed(folder / "meta.json", read_sealed(folder / "meta.json") | {key: value})
        message = rf"meta\.json.*({key}|shards beside it disagree)"
        with pytest.raises(ValueError, match=message) as error:
            open_data(make_config(str(folder)))
        assert "\n" not in str(error.value)
        shutil.rmtree(folder)
        folder = copy(kind)


def test_the_sum_of_the_data_stays_what_it_was(tmp_path):
    """data_sha256 stands in committed records: the same data has the same one in every version."""
    cfg = foreign(tmp_path, vocab_size=0)
    encoding = make_encoding("bytes", ".", {byte: rank for rank, byte in enumerate(BYTES)})
    shards = {f.name: {"sha256": sha256_file(f), "tokens": 900} for f in tmp_path.glob("*.bin")}
    write_meta(tmp_path, encoding, shards=shards, source="s", licence="l")
    expected = "83f8b930f54b66d8381d65a06f84f83f52638b0f8017703b14d7613ed2d9b19a"
    assert open_data(cfg).sha256 == expected


BAD_LINES = [
    b"YQ==",
    b"enp6 x",
    b"enp6 -1",
    b"enp6 99999999999",
    b"enp6 " + b"9" * 5000,
    b"YQ== 300",  # twice
    b"enp6 0",
    b"\xff 300",
    b"==== 300",
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_ranks_are_one_line(tmp_path, line):
    file = tmp_path / "r.tiktoken"
    write_ranks(file, BYTES)
    assert len(read_ranks(file)) == 256
    for content in (file.read_bytes() + line, line, b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.tiktoken") as error:
            read_ranks(file)
        assert "\n" not in str(error.value)


# ---- shards of other projects


def test_foreign_shards_are_held_to_their_first_use(tmp_path):
    cfg = foreign(tmp_path)
    shard = tmp_path / "x_train_000000.bin"
    beside = Path(f"{shard}.sha256")
    data = open_data(cfg)
    assert beside.read_text() == f"{sha256_file(shard)}  {shard.name}\n"
    assert len(data.warnings) == 1 and data.sha256 is None  # no val_bpb
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".bin", ".sha256", ".sha256"]
    open_data(cfg)
    write_shard(shard, np.arange(900) % 249)  # whole, but another
    said = f"{shard}: its sha256 is not the one it had when it was first used, in {beside}; fetch"
    with pytest.raises(ValueError, match=re.escape(said)):
        open_data(cfg)
    beside.unlink()
    assert len(open_data(cfg).warnings) == 1


def test_the_tokenizer_of_foreign_shards_is_held_too(tmp_path):
    (tmp_path / "f").mkdir()
    ranks = tmp_path / "r.tiktoken"
    write_ranks(ranks, BYTES)
    cfg = foreign(tmp_path / "f", tokenizer=str(ranks), vocab_size=0)
    assert open_data(cfg).warnings == [] == open_data(cfg).warnings
    assert Path(f"{ranks}.sha256").is_file()
    write_ranks(ranks, [*BYTES, b"a longer one"])
    with pytest.raises(ValueError, match=f"{ranks}: its sha256 is not the one it had when it was"):
        open_data(cfg)


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_data_that_has_lost_its_meta_is_not_taken_for_another_project_s(copy, kind):
    folder = copy(kind)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="copy: its meta.json is missing; remove the folder and"):
        open_data(make_config(str(folder)))


def test_a_rank_checks_its_own_shards_and_a_new_one_is_held_too(tmp_path):
    cfg = foreign(tmp_path)
    TokenData(cfg, part=1, parts=2)
    assert [path.name for path in tmp_path.glob("*.sha256")] == ["x_val_000000.bin.sha256"]
    TokenData(cfg, part=0, parts=2)
    write_shard(tmp_path / "x_train_000001.bin", np.arange(900) % 250)
    open_data(cfg)
    assert len(list(tmp_path.glob("*.sha256"))) == 3


def test_if_the_sum_cannot_be_written_a_line_says_so_and_the_run_goes_on(tmp_path):
    """The file system has no room for a name that is longer still."""
    (tmp_path / "f").mkdir()
    write_ranks(tmp_path / "r", BYTES)
    ranks = (tmp_path / "r").rename(tmp_path / ("r" * 246 + ".tiktoken"))
    cfg = foreign(tmp_path / "f", name="x" * 224, tokenizer=str(ranks), vocab_size=0)
    data = open_data(cfg)
    tokenizer, shard = data.warnings
    reason = r".sha256 cannot be written \(File name too long\): a change would go unseen"
    assert re.match(f"{tmp_path}/f/x*_train_000000.bin{reason}", shard)
    assert re.match(f"{ranks}{reason}", tokenizer)
    assert not list(tmp_path.rglob("*.sha256*")) and len(data.train) == 1


# ---- lines of JSON

PAIR = (
    b'{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": %s}], '
    b'"text": %s}'
)
SYSTEM = (
    b'{"messages": [{"role": "system", "content": %s}, {"role": "user", "content": "u"}, '
    b'{"role": "assistant", "content": "a"}]}'
)
LINE_BYTES = 1_000_000  # in these tests


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(readers, "LINE_BYTES", LINE_BYTES)


HOSTILE = {
    "long": PAIR % (b'"' + b"a" * LINE_BYTES + b'"', b'"t"'),
    "blank but long": b" " * (LINE_BYTES + 1),
    "deep": b"[" * 100_000,
    "deep inside": PAIR % (b"[" * 100_000, b"[" * 100_000),
    "deep role": b'{"messages": [{"role": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    "no UTF-8": PAIR % (b'"\xff"', b'"\xff"'),
    "surrogate as UTF-8": PAIR % (b'"\xed\xa0\x80"', b'"\xed\xa0\x80"'),
    "NUL": PAIR % (b'"a\0b"', b'"a\0b"'),
    "half a pair": PAIR % (b'"\\ud800"', b'"\\udfff"'),
    "UTF-16": b"\xff\xfe{\0}\0",
    "number": PAIR % (b"1e999", b"1e999"),
    "NaN": PAIR % (b"NaN", b"NaN"),
    "digits": PAIR % (b"1" * 5000, b"1" * 5000),
    "object": PAIR % (b'{"a": {}}', b"{}"),
    "cut": PAIR[:40],
    "list": b"[1]",
}
SYSTEMS = (b"[]", b"{}", b"0", b"false", b"0.0", b'["s"]')
HOSTILE |= {f"system {value.decode()}": SYSTEM % value for value in SYSTEMS}


def documents(path):
    return list(prepare_text.row_documents(open_rows(path), path, "text"))


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lines_are_named_by_number_or_skipped(tmp_path, capsys, line, short_lines):
    good, path = PAIR % (b'"a"', b'"t"'), tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good, b""]))
    for read in (read_examples, documents):
        with pytest.raises(ValueError, match=r"x\.jsonl, line 3: ") as error:
            read(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert [record.line for record in read_examples(path, "skip")] == [1, 4]
    assert "x.jsonl, line 3: skipped: " in capsys.readouterr().err


def test_a_long_line_is_read_and_a_longer_one_is_never_held(tmp_path, short_lines):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'"' + b"a" * (LINE_BYTES - 2) + b'"\n"b"\r\n\xef\xbb\xbf"c"')
    lengths = [(number, len(parse_line(line))) for number, line in numbered_lines(path)]
    assert lengths == [(1, LINE_BYTES - 2), (2, 1), (3, 1)]
    with open(path, "wb") as file:
        file.truncate(20 * LINE_BYTES)  # one line of zeros that takes no place on the disk
        file.seek(0, os.SEEK_END)
        file.write(b'\n"last"\n')
    tracemalloc.start()
    (one, long), (two, short) = numbered_lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with pytest.raises(ValueError, match="longer than 1,000,000 bytes"):
        parse_line(long)
    assert (one, two, parse_line(short)) == (1, 2, "last") and peak < 4 * LINE_BYTES


# ---- the sources themselves

UNSAFE = re.compile(
    r"\bpickle|\bmarshal\b|\bshelve\b|\bjoblib\b|\bdill\b|allow_pickle|np\.load\("
    r"|yaml\.(?:load|full_load|unsafe_load)\b|(?<![\w.])(?:eval|exec)\(|shell=True|os\.system"
)


def test_no_source_unpickles_or_evaluates_what_it_reads():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("nanojepa/**/*.py")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text()
        found = UNSAFE.search(text)
        assert not found, f"{path}: {found[0]}"
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], path
