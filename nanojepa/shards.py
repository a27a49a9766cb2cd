"""Token shards, and the meta.json beside them: what data/prepare_*.py write and a run reads.

A shard has the llm.c format: 256 little-endian int32 (magic 20240520, version 1, token count,
zeros), then the tokens as uint16. Every document begins with the document marker, a token of its
own.

meta.json is a sealed file of: tokenizer (with the sha256 of its file), vocab_size, doc_token,
bytes_per_token (UTF-8 bytes, 0 for the marker), shards (file name -> sha256, tokens, and
text_bytes, the size of its raw text), source, licence. Shards of another project have no meta.json;
each has a file <name>.sha256 beside it from its first use on, and so has their tokenizer.
"""

import hashlib
import itertools
import math
import os
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanojepa.files import (
    progress,
    read_sealed,
    sha256_file,
    whole_folder,
    write_sealed,
    write_whole,
)
from nanojepa.tokenizer import (
    MAX_VOCAB,
    load_tokenizer,
    token_bytes,
    tokenizer_file,
    train_bpe,
    write_ranks,
)

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
SHARD_TOKENS = 100_000_000  # 200 MB a file, like the FineWeb shards of modded-nanogpt
BATCH_TEXTS = 512  # how many are tokenised at a time, by several threads


# ---- one shard


def write_shard(path, tokens):
    """Write tokens, integers below 65536, as one shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header.tobytes(), np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    """The tokens of a shard, as a uint16 memmap; ValueError says what is wrong with the file."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ValueError(
            f"{path}: not a token shard (its first number is not {MAGIC}); "
            "make shards with a script in data/"
        )
    _, version, count = header[:3].tolist()
    if version != VERSION:
        raise ValueError(
            f"{path}: shard version {version}, only version {VERSION} is known; "
            "make it again with a script in data/"
        )
    size, expected = os.path.getsize(path), HEADER_BYTES + 2 * count
    if size != expected:
        raise ValueError(
            f"{path}: {size} bytes, but its header promises {expected}; "
            "it was cut off: fetch or make it again"
        )
    if count == 0:
        raise ValueError(f"{path}: holds no tokens; remove it, or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def check_shard(path, tokens, sha256=None):
    """The largest token of a shard; ValueError if the file's sha256 is another one."""
    if sha256 is not None and sha256_file(path) != sha256:
        raise ValueError(f"{path}: its sha256 is not the one in meta.json; fetch or make it again")
    return int(tokens.max())


def hold_shard(path):
    """Hold a file that no meta.json names to the sha256 it had when it was first used.

    The digest is kept in <path>.sha256, as sha256sum writes it. Returns why it can't be kept, or
    "". ValueError if the file has changed.
    """
    beside = Path(f"{path}.sha256")
    line = f"{sha256_file(path)}  {Path(path).name}\n".encode()
    if not os.path.lexists(beside):
        try:
            write_whole(beside, line)
        except OSError as error:
            return error.strerror
    elif not beside.is_file():
        raise ValueError(f"{beside}: not a file with the sha256 of {path}; remove it")
    elif beside.read_bytes() != line:
        raise ValueError(
            f"{path}: its sha256 is not the one it had when it was first used, in {beside}; "
            "fetch it again, or remove that file if it was meant to change"
        )
    return ""


class ShardWriter:
    """Write the tokens of one split as shards <prefix>_000000.bin and so on.

    What meta.json says of each is added to the dict `shards`.
    """

    def __init__(self, folder, prefix, shards):
        self.folder, self.prefix, self.shards = folder, prefix, shards
        self.tokens, self.text_bytes, self.count = array("H"), 0, 0

    def add(self, tokens, text_bytes):
        """Add a document of so many UTF-8 bytes. It is never split between shards."""
        self.tokens.extend(tokens)
        self.text_bytes += text_bytes
        if len(self.tokens) >= SHARD_TOKENS:
            self.flush()

    def flush(self):
        """Write what has been added since the last shard."""
        if not self.tokens:
            return
        name = f"{self.prefix}_{self.count:06d}.bin"
        write_shard(self.folder / name, self.tokens)
        self.shards[name] = {
            "sha256": sha256_file(self.folder / name),
            "tokens": len(self.tokens),
            "text_bytes": self.text_bytes,
        }
        self.tokens, self.text_bytes, self.count = array("H"), 0, self.count + 1


# ---- meta.json


def write_meta(folder, encoding, *, shards, source, licence, extra_tokens=0, **more):
    """Write the tokenizer's file and meta.json. A folder without meta.json is not finished.

    extra_tokens: ids after the document marker that stand for no bytes. more: what else is to be
    said of pairs data.
    """
    folder, table = Path(folder), token_bytes(encoding)
    file = "tokenizer.tiktoken"
    write_ranks(folder / file, table)
    tokenizer = {"file": file, "name": encoding.name, "pattern": encoding._pat_str}
    sizes = [len(token) for token in table] + [0] * extra_tokens
    meta = {
        "tokenizer": {**tokenizer, "sha256": sha256_file(folder / file)},
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
    """The meta.json of a data folder; ValueError names the key that is missing or impossible."""
    file = Path(folder) / "meta.json"
    advice = "remove the folder and make the data again"
    try:
        meta = read_sealed(file)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    for key, expected, holds in _requirements(meta):
        if not holds:
            raise ValueError(f"{file}: {key} is not {expected}; {advice}")
    return meta


def held_by_meta(path):
    """Whether a meta.json beside a tokenizer's file names it; ValueError if it isn't that file."""
    folder = Path(path).parent
    if not os.path.lexists(folder / "meta.json"):
        return False
    meta = read_meta(folder)
    if meta["tokenizer"]["file"] != Path(path).name:
        return False
    tokenizer_file(folder, meta)
    return True


def _requirements(meta):
    """Yield (key, what its value must be, whether it is). Each may rely on those before it."""
    size = meta.get("vocab_size")
    yield "vocab_size", "a number from 1 to 65,536", _is_index(size, MAX_VOCAB + 1) and size > 0
    marker = meta.get("doc_token")
    yield "doc_token", "a token", _is_index(marker, size)
    sizes = meta.get("bytes_per_token")
    fits = (
        isinstance(sizes, list) and len(sizes) == size and all(_is_index(n, 2**31) for n in sizes)
    )
    yield "bytes_per_token", "vocab_size numbers", fits
    expected = "file, a name without a folder, name, pattern and sha256"
    yield "tokenizer", expected, _is_tokenizer(meta.get("tokenizer"))
    shards = meta.get("shards")
    fits = isinstance(shards, dict) and all(_has_sha256(shard) for shard in shards.values())
    yield "shards", "the sha256 of each shard", fits
    if "kind" not in meta:
        return
    yield "kind", "pairs or groups", meta["kind"] in ("pairs", "groups")
    separator = meta.get("separator")
    fits = _is_index(separator, size) and separator != marker
    yield "separator", "a token other than doc_token", fits
    pred = meta.get("first_pred")
    fits = _is_index(pred, size) and pred > max(separator, marker)
    yield "first_pred", "a token after separator and doc_token", fits
    yield "keep_system", "true or false", isinstance(meta.get("keep_system"), bool)


def _is_index(value, end):
    return type(value) is int and 0 <= value < end  # a bool is none


def _has_sha256(value):
    digest = value.get("sha256") if isinstance(value, dict) else None
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _is_tokenizer(value):
    if not _has_sha256(value):
        return False
    if not all(isinstance(value.get(key), str) for key in ("file", "name", "pattern")):
        return False
    return not set("/\\\0") & set(value["file"]) and value["file"] not in ("", ".", "..")


# ---- texts become shards


def choose_encoding(tokenizer, vocab_size, texts):
    """The Encoding of a tiktoken name or a file of ranks; of BPE trained on the texts if None."""
    if tokenizer is None:
        return train_bpe(texts, vocab_size)
    if os.path.isfile(tokenizer):
        held_by_meta(tokenizer)  # of another data folder, it must be as the meta.json there says
    return load_tokenizer(tokenizer)


class Pieces(NamedTuple):
    """The texts of both splits."""

    count: int  # at most so many
    read: Callable  # returns a fresh iterator of (split, text)

    def texts(self, wanted):
        return (text for split, text in self.read() if split == wanted)


def split_documents(documents, val_fraction, train_fraction, held_out):
    """The Pieces of documents, chosen by the hash of the text, so that copies share a split.

    documents: a function that returns a fresh iterator of str. train_fraction: the share that is
    used of the documents that aren't validation. held_out: validation documents are taken from the
    rest of those, so that a choice of settings never sees the true validation documents. The last
    tenth of a single document is validation.
    """
    if not 0 < train_fraction <= 1:
        raise ValueError(f"--train-fraction {train_fraction}: must lie above 0 and at most at 1")
    digests = [_digest(text) for text in progress(documents(), "reading")]
    if not digests:
        raise ValueError("the source holds no text: check its path and the name of the text field")
    unique = sorted(set(digests))
    if len(unique) == 1 and train_fraction == 1 and not held_out:
        text = next(documents())
        cut = int(len(text) * 0.9)
        return Pieces(2, lambda: iter([("train", text[:cut]), ("val", text[cut:])]))
    size = min(len(unique) - 1, math.ceil(val_fraction * len(unique)))
    val, rest = unique[:size], unique[size:]
    unused = len(rest) - math.ceil(train_fraction * len(rest))
    if held_out and unused < size or not size:
        raise ValueError(
            f"the source holds {len(unique)} documents, too few to hold {max(1, size)} out; "
            "lower --train-fraction"
        )
    if held_out:
        val = rest[:size]
    split_of = dict.fromkeys(val, "val") | dict.fromkeys(rest[unused:], "train")

    def read():
        for text in documents():
            split = split_of.get(_digest(text))
            if split:
                yield split, text

    return Pieces(len(digests), read)


def _digest(text):
    return hashlib.sha256(text.encode()).digest()


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

    It holds <name>_train_*.bin, <name>_val_*.bin, the tokenizer and meta.json.
    documents: a function that returns a fresh iterator of str. It is called two or three times.
    tokenizer: a tiktoken name or a file of ranks; without it, BPE of vocab_size tokens is trained
    on the training documents. The other arguments are those of split_documents.
    """
    # A shard called "x_val_y" would be taken for one of the val split.
    name = re.sub(r"[^\w.-]|_(?=train_|val_)", "-", name)
    with whole_folder(out) as work:
        pieces = split_documents(documents, val_fraction, train_fraction, held_out)
        encoding = choose_encoding(tokenizer, vocab_size, pieces.texts("train"))
        shards = {}
        writers = {s: ShardWriter(work, f"{name}_{s}", shards) for s in ("train", "val")}
        rest = iter(progress(pieces.read(), "tokenising", pieces.count))
        while batch := list(itertools.islice(rest, BATCH_TEXTS)):
            encoded = encoding.encode_ordinary_batch([text for _, text in batch])
            for (split, text), tokens in zip(batch, encoded, strict=True):
                writers[split].add([encoding.eot_token, *tokens], len(text.encode()))
        for writer in writers.values():
            writer.flush()
        if train_fraction < 1:
            source += f", {train_fraction:g} of the training documents"
        if train_fraction < 1 and held_out:
            source += ", validated on others of them"
        write_meta(work, encoding, shards=shards, source=source, licence=licence)
    return Path(out)
