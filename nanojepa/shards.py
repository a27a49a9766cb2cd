"""Data folders: token shards and the meta.json beside them, written by data/ and read by a run.

A shard has the llm.c format: 256 little-endian int32 (magic 20240520, version 1, token count,
zeros), then the tokens as uint16. Every document begins with the document marker, a token of its
own. The last _train_ or _val_ in a file's name is its split.

meta.json is a sealed file of: tokenizer (with the sha256 of its file), vocab_size, doc_token,
bytes_per_token (UTF-8 bytes, 0 for the marker), shards (file name -> sha256, tokens), source,
licence. Shards of another project have no meta.json; each has a file <name>.sha256 beside it from
its first use on, and so has their tokenizer.
"""

import hashlib
import itertools
import json
import math
import os
import re
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanojepa.files import (
    progress,
    read_sealed,
    sha256_file,
    whole_folder,
    write_sealed,
    write_whole,
)
from nanojepa.show import Spelling
from nanojepa.tokenizer import (
    MAX_VOCAB,
    RANKS_FILE,
    load_tokenizer,
    saved_encoding,
    token_bytes,
    train_bpe,
    write_ranks,
)
from nanojepa.vocabulary import load_vocabulary

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
SHARD_TOKENS = 100_000_000  # 200 MB a file, like the FineWeb shards of modded-nanogpt
BATCH_TEXTS = 512  # how many are tokenised at a time, by several threads
SPLIT_OF_NAME = re.compile(r".*_(train|val)_.*\.bin")
META_KEYS = {
    "vocab_size": int,
    "doc_token": int,
    "bytes_per_token": list,
    "tokenizer": dict,
    "shards": dict,
}
PAIR_KEYS = {"kind": str, "separator": int, "first_pred": int, "keep_system": bool}


# ---- one shard


def write_shard(path, tokens):
    """Write tokens, integers below 65536, as one shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header.tobytes(), np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    """The tokens of a shard, as a uint16 memmap; ValueError says what is wrong with the file.

    train.bin and val.bin may be nanoGPT's, which have no header.
    """
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    whole = len(header) == HEADER_INTS and tuple(header[:2]) == (MAGIC, VERSION)
    if not whole and path.name in ("train.bin", "val.bin"):
        return read_headerless(path)
    if not whole:
        raise ValueError(
            f"{path}: not a token shard, which begins with {MAGIC} and {VERSION}; make shards with "
            "a script in data/"
        )
    count, size = int(header[2]), os.path.getsize(path)
    if count == 0 or size != HEADER_BYTES + 2 * count:
        raise ValueError(
            f"{path}: {size} bytes, but its header promises {count} tokens; it was cut off: fetch "
            "or make it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def read_headerless(path):
    """The tokens of a file that is nothing but uint16."""
    size = os.path.getsize(path)
    if not size or size % 2:
        raise ValueError(f"{path}: {size} bytes are no tokens of two bytes; fetch or make it again")
    return np.memmap(path, dtype="<u2", mode="r")


def hold_file(path):
    """Hold a file that no meta.json names to the sha256 it had when it was first used.

    The digest is kept in <path>.sha256, as sha256sum writes it. Returns a warning if it can't be
    kept, or "". ValueError if the file has changed.
    """
    beside = Path(f"{path}.sha256")
    line = f"{sha256_file(path)}  {Path(path).name}\n".encode()
    if not os.path.exists(beside):
        try:
            write_whole(beside, line)
        except OSError as error:
            return f"{beside} cannot be written ({error.strerror}): a change would go unseen"
    elif beside.read_bytes() != line:
        raise ValueError(
            f"{path}: its sha256 is not the one it had when it was first used, in {beside}; "
            "fetch it again, or remove that file if it was meant to change"
        )
    return ""


# ---- meta.json


def write_meta(folder, encoding, *, shards, source, licence, extra_tokens=0, **more):
    """Write the tokenizer's file and meta.json. A folder without meta.json is not finished.

    extra_tokens: ids after the document marker that stand for no bytes. more: what else is to be
    said of pairs data.
    """
    folder, table = Path(folder), token_bytes(encoding)
    write_ranks(folder / RANKS_FILE, table)
    tokenizer = {"file": RANKS_FILE, "name": encoding.name, "pattern": encoding._pat_str}
    sizes = [len(token) for token in table] + [0] * extra_tokens
    meta = {
        "tokenizer": {**tokenizer, "sha256": sha256_file(folder / RANKS_FILE)},
        "vocab_size": len(sizes),
        "doc_token": encoding.eot_token,
        "source": source,
        "licence": licence,
        **more,
        "shards": shards,
        "bytes_per_token": sizes,
    }
    write_sealed(folder / "meta.json", meta)


def read_meta(folder):
    """The meta.json of a data folder; ValueError if it is damaged, or lacks a key."""
    file = Path(folder) / "meta.json"
    advice = "remove the folder and make the data again"
    try:
        meta = read_sealed(file)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    for key, kind in (META_KEYS | PAIR_KEYS if "kind" in meta else META_KEYS).items():
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{file}: {key} is no {kind.__name__}; {advice}")
    return meta


def find_meta(folder):
    """The meta.json of a data folder, None if it has none; ValueError if it can't be trusted."""
    if not folder.is_dir():
        raise ValueError(
            f"DATA_PATH={folder}: no such folder; make one with a script in data/ (docs/data.md)"
        )
    if (folder / "meta.json").exists():
        return read_meta(folder)
    # The scripts in data/ call it so. Without meta.json, pairs would be read as text.
    if (folder / RANKS_FILE).exists():
        raise ValueError(
            f"{folder}: its meta.json is missing; remove the folder and make the data again "
            "(data/prepare_fineweb.py only adds what is missing)"
        )
    return None


# ---- a folder is read


class DataFolder:
    """The checked shards of a folder, and what is known of their tokens.

    train, val: the tokens of each shard. encode, token_table, bytes_per_token: None if the
    tokenizer of another project's shards is not given. prefixed: as of a Vocabulary. sha256: of all
    that val_bpb is made of; None without a meta.json. warnings: lines for the log.
    """

    def __init__(self, cfg, folder=None, part=0, parts=1):
        """Check one of `parts` parts of the shards; the processes of a node share them."""
        self.cfg, self.folder = cfg, Path(folder or cfg.data_path)
        self.meta, self.warnings = find_meta(self.folder), []
        self.read_vocabulary()
        files = self.find_files()
        self.train, self.val = ([read_shard(f) for f in files[split]] for split in files)
        shards = list(zip(files["train"] + files["val"], self.train + self.val, strict=True))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            warnings = pool.map(self.check_shard, *zip(*shards[part::parts], strict=True))
            self.warnings += [warning for warning in warnings if warning][:1]

    def read_vocabulary(self):
        """Find the tokenizer, the document marker and the size of the vocabulary."""
        cfg, meta = self.cfg, self.meta
        self.sha256 = self.encode = self.token_table = self.bytes_per_token = None
        self.doc_token, self.vocab_size, self.prefixed = cfg.doc_token, cfg.vocab_size, None
        if meta:
            encoding = saved_encoding(self.folder, meta)
            self.encode, self.token_table = encoding.encode_ordinary, token_bytes(encoding)
            self.doc_token, self.sha256 = meta["doc_token"], self.hash_meta()
            if cfg.tokenizer:
                self.warnings.append(
                    f"TOKENIZER={cfg.tokenizer} is not used: {self.folder} has a meta.json"
                )
            sizes = meta["bytes_per_token"]
            self.token_table += [b""] * (len(sizes) - len(self.token_table))
        elif cfg.tokenizer:
            sizes = self.read_foreign_vocabulary()
        elif cfg.vocab_size:
            self.warnings.append(
                f"no val_bpb: {self.folder} has no meta.json and TOKENIZER is not set, so the "
                "bytes per token are unknown"
            )
            return
        else:
            raise ValueError(
                f"{self.folder} has no meta.json: set TOKENIZER to the tokenizer of its shards, "
                "or VOCAB_SIZE, without val_bpb"
            )
        self.bytes_per_token = np.array(sizes, dtype=np.int64)
        self.vocab_size = cfg.vocab_size or len(sizes)
        if self.vocab_size < len(sizes):
            raise ValueError(
                f"VOCAB_SIZE={cfg.vocab_size}: the tokens of {self.folder} need {len(sizes)}"
            )

    def read_foreign_vocabulary(self):
        """Take the tokenizer that TOKENIZER names; returns the bytes of each token."""
        cfg = self.cfg
        if os.path.isfile(cfg.tokenizer):
            self.warnings += filter(None, [hold_file(cfg.tokenizer)])
        vocabulary = load_vocabulary(cfg.tokenizer)
        self.encode, self.token_table = vocabulary.encode, vocabulary.table
        self.prefixed = vocabulary.prefixed
        if cfg.doc_token >= len(vocabulary.table) and vocabulary.marker is not None:
            self.doc_token = vocabulary.marker
            self.warnings.append(
                f"DOC_TOKEN={cfg.doc_token} is none of the {len(vocabulary.table)} tokens of "
                f"{cfg.tokenizer}; its own, {vocabulary.marker}, is taken"
            )
        return [len(token) for token in vocabulary.table]

    def text_bytes(self, idx, targets):
        """Bytes of the text of targets (R, T) after idx (R, T), arrays; -1 is no target."""
        sizes, scored = self.bytes_per_token, targets >= 0
        if sizes is None:
            return 0
        total = int(sizes[targets[scored]].sum())
        if self.prefixed is not None:
            begins = sizes[idx[scored]] == 0  # after a token that is no text
            total -= int((self.prefixed[targets[scored]] & begins).sum())
        return total

    def find_files(self):
        """{"train": [path], "val": [path]}; ValueError if they aren't those of meta.json."""
        files = {"train": [], "val": []}
        for path in sorted(self.folder.glob("*.bin")):
            if split := SPLIT_OF_NAME.fullmatch(path.name):
                files[split[1]].append(path)
        if not any(files.values()):  # nanoGPT's
            whole = {split: self.folder / f"{split}.bin" for split in files}
            files = {split: [path] if path.is_file() else [] for split, path in whole.items()}
        for split, paths in files.items():
            if not paths:
                raise ValueError(
                    f"DATA_PATH={self.cfg.data_path}: no *_{split}_*.bin in it; make shards with "
                    "a script in data/ (docs/data.md)"
                )
        names = {path.name for paths in files.values() for path in paths}
        if self.meta and (odd := names ^ set(self.meta["shards"])):
            raise ValueError(
                f"{self.folder / 'meta.json'} and the shards beside it disagree on "
                f"{', '.join(sorted(odd))}; remove the folder and make the data again"
            )
        return files

    def check_shard(self, path, tokens):
        """Returns hold_file's warning; ValueError if the shard isn't what it was, or can't be."""
        warning = ""
        if not self.meta:
            warning = hold_file(path)
        elif sha256_file(path) != self.meta["shards"][path.name]["sha256"]:
            raise ValueError(
                f"{path}: its sha256 is not the one in meta.json; fetch or make it again"
            )
        size = self.vocab_size if self.bytes_per_token is None else len(self.bytes_per_token)
        if (largest := int(tokens.max())) >= size:
            raise ValueError(
                f"{path}: token {largest} is outside the vocabulary of {size}; set VOCAB_SIZE or "
                "the right TOKENIZER"
            )
        return warning

    def spelling(self):
        """How its tokens are shown; by number if the tokenizer is unknown."""
        table = self.token_table or []

        def bytes_of(token):
            return table[token] if token < len(table) and table[token] else b"<%d>" % token

        return Spelling(
            lambda ids: [bytes_of(token).decode(errors="backslashreplace") for token in ids],
            lambda ids: b"".join(map(bytes_of, ids)).decode(errors="replace"),
        )

    def identity(self):
        """What data a run is fed, for JSON.

        The sha256 of meta.json's shards. Foreign shards, which are held to their first use, are
        known by their place and sizes.
        """
        sizes = [len(tokens) for tokens in self.train + self.val]
        return self.sha256 or [str(self.folder.resolve()), *sizes]

    def hash_meta(self):
        shards = self.meta["shards"]
        parts = [[name, shards[name]["sha256"]] for name in sorted(shards)]
        parts += [self.meta["doc_token"], self.meta["bytes_per_token"]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---- texts become shards


def fill_shards(documents):
    """Yield the tokens of one shard after another; no document is split between two."""
    held = array("H")
    for tokens in documents:
        held.extend(tokens)
        if len(held) >= SHARD_TOKENS:
            yield held
            held = array("H")
    if held:
        yield held


def write_folder(folder, name, documents, encoding, extra_tokens=0, **meta):
    """Write shards <name>_train_*.bin and <name>_val_*.bin, the tokenizer and meta.json.

    documents: {split: an iterable of documents, lists of tokens}. meta: as write_meta.
    """
    vocab_size, shards = encoding.n_vocab + extra_tokens, {}
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"{vocab_size} tokens; a shard holds uint16, so at most {MAX_VOCAB}: choose the "
            "tokenizer gpt2 or r50k_base, or train one with --vocab-size"
        )
    for split in ("train", "val"):
        for number, tokens in enumerate(fill_shards(documents[split])):
            path = folder / f"{name}_{split}_{number:06d}.bin"
            write_shard(path, tokens)
            shards[path.name] = {"sha256": sha256_file(path), "tokens": len(tokens)}
    write_meta(folder, encoding, shards=shards, extra_tokens=extra_tokens, **meta)


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def hold_out(digests, fraction):
    """(held out, rest) of the different digests: the smallest ones are held out, never all."""
    unique = sorted(set(digests))
    size = min(len(unique) - 1, math.ceil(fraction * len(unique)))
    return unique[:size], unique[size:]


def choose_splits(documents, val_fraction, train_fraction, held_out):
    """{digest of a document: "train" or "val"}, by the hash of the text: copies share a split.

    documents: an iterable of str. train_fraction: the share that is used of the documents that
    aren't validation. held_out: validation documents are taken from the rest of those, so that a
    choice of settings never sees the true validation documents.
    """
    if not 0 < train_fraction <= 1:
        raise ValueError(f"--train-fraction {train_fraction}: must lie above 0 and at most at 1")
    digests = [digest(text) for text in progress(documents, "reading")]
    if not digests:
        raise ValueError("the source holds no text: check its path and the name of the text field")
    val, rest = hold_out(digests, val_fraction)
    unused = len(rest) - math.ceil(train_fraction * len(rest))
    if held_out and unused < len(val) or not val:
        raise ValueError(
            f"the source holds {len(val) + len(rest)} documents, too few to hold "
            f"{max(1, len(val))} out; lower --train-fraction"
        )
    if held_out:
        val = rest[: len(val)]
    return dict.fromkeys(val, "val") | dict.fromkeys(rest[unused:], "train")


def prepare(
    out,
    name,
    documents,
    *,
    source,
    licence,
    val_fraction,
    vocab_size=None,
    tokenizer=None,
    train_fraction=1.0,
    held_out=False,
):
    """Tokenise documents into the folder `out`, which appears whole or not at all; returns it.

    documents: a function that returns a fresh iterator of str. tokenizer: a tiktoken name or a file
    of ranks; without it, BPE of vocab_size tokens is trained on the training documents. The other
    arguments are those of write_meta and choose_splits.
    """
    with whole_folder(out) as work:
        first = list(itertools.islice(documents(), 2))
        if len(first) == 1:  # its last tenth is the val split
            cut = int(len(first[0]) * 0.9)
            halves = {"train": first[0][:cut], "val": first[0][cut:]}
            documents = halves.values
            split_of = {digest(text): split for split, text in halves.items()}
        else:
            split_of = choose_splits(documents(), val_fraction, train_fraction, held_out)

        def texts(split):
            return (text for text in documents() if split_of.get(digest(text)) == split)

        encoding = load_tokenizer(tokenizer) if tokenizer else train_bpe(texts("train"), vocab_size)
        if train_fraction < 1:
            source += f", {train_fraction:g} of the training documents"
        if train_fraction < 1 and held_out:
            source += ", validated on others of them"
        encoded = {
            split: encode_texts(progress(texts(split), f"tokenising {split}", count), encoding)
            for split, count in Counter(split_of.values()).items()
        }
        write_folder(work, name, encoded, encoding, source=source, licence=licence)
    return Path(out)


def encode_texts(texts, encoding):
    """Yield the tokens of each text, the document marker first."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH_TEXTS)):
        for tokens in encoding.encode_ordinary_batch(batch):
            yield [encoding.eot_token, *tokens]
