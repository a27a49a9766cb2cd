"""Tokenizers: tiktoken's, files of ranks, and byte-pair encodings trained here.

A file of ranks has a line "base64-token rank" for each token, as tiktoken's own files. The document
marker is a token of its own, with the id after the last rank.
"""

import base64
import os
from pathlib import Path

import rustbpe
import tiktoken

from nanojepa.files import progress, sha256_file, write_whole

MAX_VOCAB = 65536  # the tokens of a shard are uint16
# How text is cut before BPE: GPT-4's pattern, but with runs of at most two digits, as in nanochat.
# That suits small vocabularies.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# The pattern of gpt2, r50k_base and p50k_base, with which a file of ranks is read.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def one_line(error):
    """The message of a library's exception as one line, not too long."""
    return " ".join(str(error).split())[:300]


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
    """The Encoding of a file of ranks or a tiktoken name; ValueError if a shard can't hold it."""
    if os.path.exists(name):
        ranks = read_ranks(name)
        for byte in range(256):
            if bytes([byte]) not in ranks:  # tiktoken would panic at a text that has it
                raise ValueError(
                    f"{name}: no rank for the byte {byte}, so it can't encode every text; "
                    "give a whole tokenizer"
                )
        encoding = make_encoding(Path(name).stem, GPT2_PATTERN, ranks)
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
    if encoding.n_vocab > MAX_VOCAB:
        raise ValueError(
            f"tokenizer {name!r} has {encoding.n_vocab} tokens; a shard holds uint16, so at most "
            f"{MAX_VOCAB}: choose gpt2 or r50k_base, or train one with --vocab-size"
        )
    return encoding


# ---- what bytes a token stands for


def fill_table(ranks, size):
    """[bytes of token 0, 1, ...]; b"" for an id that has no rank."""
    table = [b""] * size
    for token, rank in ranks.items():
        table[rank] = token
    return table


def token_bytes(encoding):
    """The bytes of every token id of an Encoding; b"" for the document marker."""
    return fill_table(encoding._mergeable_ranks, encoding.n_vocab)


def token_table(tokenizer):
    """As token_bytes, of a tiktoken name or a file of ranks, which may lack single bytes."""
    if not os.path.exists(tokenizer):
        return token_bytes(load_tokenizer(tokenizer))
    ranks = read_ranks(tokenizer)
    last = max(ranks.values())
    if last > MAX_VOCAB - 2:
        raise ValueError(
            f"{tokenizer} has ranks up to {last}; a shard holds uint16: "
            "it is not this data's tokenizer"
        )
    return fill_table(ranks, last + 2)


def read_ranks(path):
    """{token bytes: rank} of a file of ranks; ValueError names the file and the line."""
    ranks, seen = {}, set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                token, rank = line.split()
                token, rank = base64.b64decode(token, validate=True), int(rank)
            except ValueError:
                raise ValueError(
                    f"{place}: not 'base64-token rank': is this a tiktoken file?"
                ) from None
            if not token or not 0 <= rank < 2**31 or token in ranks or rank in seen:
                raise ValueError(
                    f"{place}: a token or rank that is empty, out of range, or there twice: "
                    "is this a tiktoken file?"
                )
            ranks[token] = rank
            seen.add(rank)
    if not ranks:
        raise ValueError(f"{path} holds no ranks: give a tiktoken file, or a tokenizer's name")
    return ranks


def write_ranks(path, table):
    """Write a token table as a file of ranks."""
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(table) if token)
    write_whole(path, *lines)


# ---- the tokenizer of a data folder


def tokenizer_file(folder, meta):
    """The file of ranks of a data folder; ValueError if it isn't the one that meta.json names."""
    path = Path(folder) / meta["tokenizer"]["file"]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; remove the folder and make the data again")
    if sha256_file(path) != meta["tokenizer"]["sha256"]:
        raise ValueError(
            f"{path}: its sha256 is not the one in meta.json; "
            "remove the folder and make the data again"
        )
    return path


def saved_encoding(folder, meta):
    """The Encoding with which a data folder was made."""
    tokenizer, ranks = meta["tokenizer"], read_ranks(tokenizer_file(folder, meta))
    try:
        return make_encoding(tokenizer["name"], tokenizer["pattern"], ranks)
    except ValueError as error:
        raise ValueError(
            f"{Path(folder) / 'meta.json'}: its tokenizer has no pattern that can be used "
            f"({one_line(error)}); remove the folder and make the data again"
        ) from None
