"""Token shards and the meta.json beside them: what every script in data/ writes and train_gpt.py reads.

A shard is the llm.c format: 256 little-endian int32 (magic 20240520, version 1, token count, zeros),
then the tokens as uint16. Every document begins with the document marker, a token of its own.
`meta.json`: tokenizer, vocab_size, doc_token, bytes_per_token (UTF-8 bytes, 0 for the marker), shards
(file name -> sha256, tokens, and text_bytes, the size of the raw text in it), source, licence.
"""
import base64
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
META_KEYS = {"tokenizer", "vocab_size", "doc_token", "source", "licence", "shards", "bytes_per_token"}
SHARD_TOKENS = 100_000_000  # as the FineWeb shards of modded-nanogpt: 200 MB a file
# How text is cut before BPE: GPT-4's pattern with runs of at most two digits (as nanochat), which suits small vocabularies.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
                 r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")


def progress(iterable, total=None, desc=""):
    """The iterable with a progress bar and the time that is left; without tqdm, as it is."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, desc=desc, mininterval=0.5)


def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_shard(path, tokens):
    """Write tokens, any integers below 65536, as one shard; the file appears whole or not at all."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    part = Path(f"{path}.part")
    with open(part, "wb") as f:
        f.write(header.tobytes())
        f.write(np.asarray(tokens, dtype="<u2").tobytes())
    os.replace(part, path)


def read_shard(path):
    """The tokens of an llm.c shard as a uint16 memmap; ValueError names the file and what is wrong with it."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ValueError(f"{path}: not a token shard (its first number is not {MAGIC}); make shards with a script in data/")
    if header[1] != VERSION:
        raise ValueError(f"{path}: shard version {header[1]}, only version {VERSION} is known; make it again with a script in data/")
    expected, size = 4 * HEADER_INTS + 2 * int(header[2]), os.path.getsize(path)
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, but its header promises {expected}; it was cut off: fetch or make it again")
    if header[2] == 0:
        raise ValueError(f"{path}: holds no tokens; remove it, or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


def check_shard(path, tokens, sha256=None):
    """The largest token of a shard; ValueError where its sha256 is another one."""
    if sha256 is not None and sha256_file(path) != sha256:
        raise ValueError(f"{path}: its sha256 is not the one in meta.json; fetch or make it again")
    return int(tokens.max())


def train_bpe(texts, vocab_size):
    """Byte-pair ranks trained by rustbpe on an iterable of str: a tiktoken Encoding of vocab_size - 1
    ranks, and the document marker as the last id. Deterministic."""
    import rustbpe
    import tiktoken
    if not 258 <= vocab_size <= 65536:
        raise SystemExit(f"error: --vocab-size {vocab_size}: choose 258 (all bytes, a merge and the marker) to 65536 (what uint16 holds)")
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(progress(texts, desc="training BPE"), vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def load_tokenizer(name):
    """A tiktoken Encoding from a tiktoken name, or from a file of ranks (base64, space, rank: one a line).

    A file is read with GPT-2's split pattern, which is that of r50k_base, gpt2 and p50k_base.
    """
    try:
        import tiktoken
    except ImportError:
        raise SystemExit(f"error: tokenizer {name!r} needs tiktoken: pip install tiktoken, or give a file of ranks") from None
    if os.path.exists(name):
        ranks = read_ranks(name)
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        encoding = tiktoken.Encoding(Path(name).stem, pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": max(ranks.values()) + 1})
    elif name in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as e:  # tiktoken fetches the ranks on first use: any error of the network or the disk
            raise SystemExit(f"error: tokenizer {name!r} cannot be fetched ({' '.join(str(e).split())[:200]}); give a file of ranks") from None
    else:
        raise SystemExit(f"error: tokenizer {name!r} is neither a file of ranks nor one of tiktoken's: "
                         f"{', '.join(tiktoken.list_encoding_names())}")
    if encoding.n_vocab > 65536:
        raise SystemExit(f"error: tokenizer {name!r} has {encoding.n_vocab} tokens; a shard holds uint16, so at most 65536: "
                         f"choose gpt2 or r50k_base, or train one with --vocab-size")
    return encoding


def saved_encoding(folder, meta):
    """The tiktoken Encoding with which a data folder was made, without its marker: for encode_ordinary."""
    import tiktoken
    saved = meta["tokenizer"]
    return tiktoken.Encoding(saved["name"], pat_str=saved["pattern"], mergeable_ranks=read_ranks(Path(folder) / saved["file"]), special_tokens={})


def read_ranks(path):
    """{token bytes: rank} of a tiktoken file; SystemExit naming file and line where one doesn't parse."""
    ranks = {}
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise SystemExit(f"error: {path}, line {number}: not 'base64-token rank': is this a tiktoken file?") from None
    if not ranks:
        raise SystemExit(f"error: {path} holds no ranks: give a tiktoken file, or a tokenizer's name")
    return ranks


def write_ranks(path, table):
    """Write a token table as a tiktoken file, which read_ranks and tiktoken read."""
    with open(path, "wb") as f:
        for i, token in enumerate(table):
            if token:
                f.write(base64.b64encode(token) + b" %d\n" % i)


def token_table(tokenizer):
    """The bytes of every token id of a tiktoken name or a file of ranks (which needs no tiktoken), b"" for the document
    marker, the id behind the last rank."""
    if os.path.exists(tokenizer):
        ranks = read_ranks(tokenizer)
        if max(ranks.values()) > 65534:
            raise SystemExit(f"error: {tokenizer} has ranks up to {max(ranks.values())}; a shard holds uint16: it is not this data's tokenizer")
        table = [b""] * (max(ranks.values()) + 2)
        for token, rank in ranks.items():
            table[rank] = token
        return table
    return token_bytes(load_tokenizer(tokenizer))


def token_bytes(encoding):
    """The bytes of every token id, b"" for the document marker and for ids that stand for nothing."""
    table = [b""] * encoding.n_vocab
    for i in range(encoding.n_vocab):
        if i != encoding.eot_token:
            try:
                table[i] = encoding.decode_single_token_bytes(i)
            except KeyError:
                pass
    return table


def split_documents(documents, val_fraction, train_fraction, held_out):
    """Choose the documents of both splits by the hash of their text, so that copies of one text fall on one side.

    documents: a function that returns a fresh iterator of str. train_fraction: of the documents that aren't validation;
    held_out: validation documents are taken from the rest of those, so that a choice made on them has not seen the true ones.
    Returns (number of documents, the digests of the texts of both splits {"val": set, "train": set}, or None where there is a
    single document, whose last tenth is validation).
    """
    digests = [hashlib.sha256(text.encode()).digest() for text in progress(documents(), desc="reading")]
    if not digests:
        raise SystemExit("error: the source holds no text: check its path and the name of the text field")
    unique = sorted(set(digests))
    if len(unique) == 1 and train_fraction == 1 and not held_out:
        return len(digests), None
    size = min(len(unique) - 1, math.ceil(val_fraction * len(unique)))
    val, rest = unique[:size], unique[size:]
    left = len(rest) - math.ceil(train_fraction * len(rest))
    if held_out and left < size or not size:
        raise SystemExit(f"error: the source holds {len(unique)} documents, too few to hold {max(1, size)} out; lower --train-fraction")
    return len(digests), {"val": set(rest[:size] if held_out else val), "train": set(rest[left:])}


def prepare(out, name, documents, *, source, licence, val_fraction, vocab_size=None, tokenizer=None, train_fraction=1.0, held_out=False):
    """Tokenise documents into out/<name>_train_*.bin and out/<name>_val_*.bin with out/meta.json.

    documents: a function that returns a fresh iterator of str (read two or three times, never held).
    tokenizer: a tiktoken name or file of ranks; without it, BPE of vocab_size is trained on the training documents.
    train_fraction, held_out: as split_documents.
    The folder appears whole or not at all.
    """
    out = Path(out)
    if out.exists():
        raise SystemExit(f"error: {out} exists: remove it, or choose another --out")
    work = out.with_name(f"{out.name}.part{os.getpid()}")
    name = re.sub(r"[^\w.-]|_(?=train_|val_)", "-", name)  # "x_val_y" would be taken for a val shard
    count, chosen = split_documents(documents, val_fraction, train_fraction, held_out)

    def pieces():  # (split, text) of every document
        for text in documents():
            if chosen is None:
                cut = int(len(text) * 0.9)
                yield "train", text[:cut]
                yield "val", text[cut:]
                return
            digest = hashlib.sha256(text.encode()).digest()
            for split in ("val", "train"):
                if digest in chosen[split]:
                    yield split, text

    if tokenizer is None:
        encoding = train_bpe((text for split, text in pieces() if split == "train"), vocab_size)
    else:
        encoding = load_tokenizer(tokenizer)
    marker = encoding.eot_token
    work.mkdir(parents=True)
    shards, buffers = {}, {"train": [], "val": []}
    filled, text_bytes = {"train": 0, "val": 0}, {"train": 0, "val": 0}

    def flush(split):
        file = f"{name}_{split}_{sum(s.startswith(f'{name}_{split}_') for s in shards):06d}.bin"
        write_shard(work / file, np.concatenate(buffers[split]))
        shards[file] = {"sha256": sha256_file(work / file), "tokens": filled[split], "text_bytes": text_bytes[split]}
        buffers[split], filled[split], text_bytes[split] = [], 0, 0

    def encode_batch(batch):
        for (split, text), ids in zip(batch, encoding.encode_ordinary_batch([t for _, t in batch])):
            buffers[split].append(np.array([marker, *ids], dtype=np.uint16))
            filled[split] += len(ids) + 1
            text_bytes[split] += len(text.encode())
            if filled[split] >= SHARD_TOKENS:
                flush(split)

    batch = []
    for piece in progress(pieces(), count if chosen is not None else 2, "tokenising"):
        batch.append(piece)
        if len(batch) == 512:
            encode_batch(batch)
            batch = []
    encode_batch(batch)
    for split in ("train", "val"):
        if filled[split]:
            flush(split)

    table = token_bytes(encoding)
    write_ranks(work / "tokenizer.tiktoken", table)
    if train_fraction < 1:
        source += f", {train_fraction:g} of the training documents" + (", validated on others of them" if held_out else "")
    write_meta(work, tokenizer={"file": "tokenizer.tiktoken", "name": encoding.name, "pattern": encoding._pat_str},
               table=table, doc_token=marker, shards=shards, source=source, licence=licence)
    os.replace(work, out)
    return out


def write_meta(folder, *, tokenizer, table, doc_token, shards, source, licence, **more):
    """meta.json, last of all: a folder without it is not finished. more: what pairs data says besides."""
    meta = {"tokenizer": tokenizer, "vocab_size": len(table), "doc_token": doc_token, "source": source,
            "licence": licence, **more, "shards": shards, "bytes_per_token": [len(token) for token in table]}
    part = Path(folder) / "meta.json.part"
    part.write_text(json.dumps(meta))
    os.replace(part, Path(folder) / "meta.json")
