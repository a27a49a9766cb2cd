"""Tokenizers: tiktoken's, files of ranks, and byte-pair encodings trained here.

A file of ranks has a line "base64-token rank" for each token, as tiktoken's own files. The document
marker is a token of its own, with the id after the last rank.
"""

import base64
import os
from pathlib import Path

import rustbpe
import tiktoken

from nanojepa.files import one_line, progress, sha256_file, write_whole

RANKS_FILE = "tokenizer.tiktoken"  # of a data folder
MAX_VOCAB = 65536  # the tokens of a shard are uint16
# How text is cut before BPE: GPT-4's pattern, but with runs of at most two digits, as in nanochat.
# That suits small vocabularies.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# The pattern of gpt2, r50k_base and p50k_base, with which a file of ranks is read.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def make_encoding(name, pattern, ranks):
    """The tiktoken Encoding of these ranks and the document marker."""
    marker = {"<|endoftext|>": max(ranks.values()) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=marker)


def train_bpe(texts, vocab_size):
    """The Encoding that rustbpe trains on an iterable of str: vocab_size tokens with the marker.

    The same texts give the same Encoding.
    """
    if not 258 <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"--vocab-size {vocab_size}: choose 258 (all bytes, a merge and the marker) "
            f"to {MAX_VOCAB} (what uint16 holds)"
        )
    tokenizer = rustbpe.Tokenizer()
    texts = progress(texts, "training BPE")
    tokenizer.train_from_iterator(texts, vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    return make_encoding("bpe", SPLIT_PATTERN, ranks)


def load_tokenizer(name):
    """The Encoding of a file of ranks or a tiktoken name; ValueError says why there is none."""
    if os.path.exists(name):
        encoding = make_encoding(Path(name).stem, GPT2_PATTERN, read_ranks(name))
    elif name in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:  # the ranks are fetched on first use: anything may fail
            raise ValueError(
                f"tokenizer {name!r} cannot be fetched ({one_line(error)}); give a file of ranks"
            ) from None
    else:
        known = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(
            f"tokenizer {name!r} is neither a file of ranks nor one of tiktoken's: {known}"
        )
    return encoding


def token_bytes(encoding):
    """[bytes of token 0, 1, ...] of an Encoding; b"" for an id without a rank, as the marker's."""
    table = [b""] * encoding.n_vocab
    for token, rank in encoding._mergeable_ranks.items():
        table[rank] = token
    return table


# ---- files of ranks


def read_ranks(path):
    """{token bytes: rank} of a file of ranks; ValueError says what is wrong with it."""
    ranks, count = {}, 0
    with open(path, "rb") as file:
        for count, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(
                    f"{path}, line {count}: not 'base64-token rank': is this a tiktoken file?"
                ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:  # tiktoken would panic at a text that has it
        raise ValueError(
            f"{path}: no rank for the byte {missing[0]}, so it can't encode every text; give a "
            "whole tokenizer"
        )
    used = set(ranks.values())
    if len(used) < count or min(used) < 0 or max(used) >= 2**20 or b"" in ranks:
        raise ValueError(f"{path}: a token or rank is there twice, or out of range")
    return ranks


def write_ranks(path, table):
    """Write a token table as a file of ranks."""
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(table) if token)
    write_whole(path, *lines)


def saved_encoding(folder, meta):
    """The Encoding with which a data folder was made; ValueError if its file is another one."""
    path, tokenizer = Path(folder) / RANKS_FILE, meta["tokenizer"]
    advice = "remove the folder and make the data again"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {advice}")
    if sha256_file(path) != tokenizer["sha256"]:
        raise ValueError(f"{path}: its sha256 is not the one in meta.json; {advice}")
    return make_encoding(tokenizer["name"], tokenizer["pattern"], read_ranks(path))
