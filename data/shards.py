"""Token shards and the meta.json beside them: what every script in data/ writes and train_gpt.py reads.

A shard is the llm.c format: 256 little-endian int32 (magic 20240520, version 1, token count, zeros),
then the tokens as uint16. Every document begins with the document marker, a token of its own.
`meta.json`: tokenizer (with the sha256 of its file), vocab_size, doc_token, bytes_per_token (UTF-8 bytes, 0 for the
marker), shards (file name -> sha256, tokens, and text_bytes, the size of the raw text in it), source, licence; last its
own sha256. A shard of another project, and its tokenizer's file, has a file <name>.sha256 beside it, from its first use on.
"""
import base64
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
LINE_BYTES = 10_000_000  # of a line of JSON, at most
SHARD_TOKENS = 100_000_000  # as the FineWeb shards of modded-nanogpt: 200 MB a file
# How text is cut before BPE: GPT-4's pattern with runs of at most two digits (as nanochat), which suits small vocabularies.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
                 r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


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


def sync_folder(path):
    """Wait until the names in a folder are on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some network file systems can't
            raise
    finally:
        os.close(folder)


def write_whole(path, *chunks):
    """Write bytes into a file that appears whole or not at all, whatever kills the process or the machine."""
    part = Path(f"{path}.part{os.urandom(4).hex()}")  # nodes that share a disk may have the same process ids
    try:
        with open(part, "xb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(Path(path).parent)


@contextlib.contextmanager
def whole_folder(out):
    """A new folder to write into, which becomes `out` in the end, or vanishes where something fails."""
    work = out.with_name(f"{out.name}.part{os.getpid()}")
    work.mkdir(parents=True)
    try:
        yield work
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(out.parent)


def seal_of(text):
    """The last key and the end of a sealed JSON object that begins with this text, bytes."""
    return b'"sha256": "%s"}' % hashlib.sha256(text).hexdigest().encode()


def write_sealed(path, obj):
    """Write a dict as one JSON object whose last key, sha256, is the digest of the text before it."""
    assert "sha256" not in obj
    text = json.dumps(obj)[:-1].encode() + (b", " if obj else b"")
    write_whole(path, text, seal_of(text))


def read_sealed(path):
    """The dict of a file that write_sealed has written; ValueError names the file and says why it is not that."""
    try:
        blob = Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    text = blob[:-len(seal_of(b""))]
    if blob[len(text):] != seal_of(text):
        raise ValueError(f"{path}: its last key is not the sha256 of the text before it, so it was damaged, or written by something else")
    try:
        obj = json.loads(blob)
        del obj["sha256"]
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: not a JSON object ({e})") from None
    return obj


def json_lines(path):
    """Yield (number, function that returns the line's JSON or raises ValueError) of a file's lines that aren't blank. A line
    that is too long is never held in memory."""
    def load(line):
        if line is None:
            raise ValueError(f"longer than {LINE_BYTES:,} bytes")
        try:
            return json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not JSON ({e})") from None
    with open(path, "rb") as f:
        for number in itertools.count(1):
            line = f.readline(LINE_BYTES + 1)
            if not line:
                return
            if len(line) > LINE_BYTES and not line.endswith(b"\n"):
                part, line = line, None
                while part and not part.endswith(b"\n"):
                    part = f.readline(2**16)
            if line is None or line.strip():
                yield number, functools.partial(load, line)


def write_shard(path, tokens):
    """Write tokens, any integers below 65536, as one shard."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_whole(path, header.tobytes(), np.asarray(tokens, dtype="<u2").tobytes())


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


def hold_shard(path):
    """Hold a file without meta.json, a shard or tokenizer, to the sha256 it had when it was first used, which stands in <path>.sha256
    as sha256sum writes it. Why it can't be, or ""; ValueError where it differs."""
    beside, line = Path(f"{path}.sha256"), f"{sha256_file(path)}  {Path(path).name}\n".encode()
    if not os.path.lexists(beside):
        try:
            write_whole(beside, line)
        except OSError as e:
            return e.strerror
    elif not beside.is_file():
        raise ValueError(f"{beside}: not a file with the sha256 of {path}; remove it")
    elif beside.read_bytes() != line:
        raise ValueError(f"{path}: its sha256 is not the one it had when it was first used, in {beside}; fetch it again, or remove that file if "
                         "it was meant to change")
    return ""


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

    A file is read with GPT-2's split pattern, which is that of r50k_base, gpt2 and p50k_base. Where a meta.json beside it names it,
    it must have the sha256 that stands there.
    """
    try:
        import tiktoken
    except ImportError:
        raise SystemExit(f"error: tokenizer {name!r} needs tiktoken: pip install tiktoken, or give a file of ranks") from None
    if os.path.exists(name):
        ranks = read_ranks(name)
        if missing := [i for i in range(256) if bytes([i]) not in ranks]:  # tiktoken would panic where a text has it
            raise SystemExit(f"error: {name}: no rank for the byte {missing[0]}, so it can't encode every text; give a whole tokenizer")
        try:
            held_by_meta(name)
        except ValueError as e:
            raise SystemExit(f"error: {e}") from None
        encoding = tiktoken.Encoding(Path(name).stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
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
    saved, ranks = meta["tokenizer"], read_ranks(tokenizer_file(folder, meta))
    try:
        return tiktoken.Encoding(saved["name"], pat_str=saved["pattern"], mergeable_ranks=ranks, special_tokens={})
    except ValueError as e:
        raise ValueError(f"{Path(folder) / 'meta.json'}: its tokenizer has no pattern that can be used ({' '.join(str(e).split())[:200]}); "
                         "remove the folder and make the data again") from None


def tokenizer_file(folder, meta):
    """The file of ranks of a data folder; ValueError where its sha256 is not the one in meta.json."""
    path = Path(folder) / meta["tokenizer"]["file"]
    if not path.is_file() or sha256_file(path) != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{path}: {'its sha256 is not the one in meta.json' if path.is_file() else 'no such file'}; remove the folder and make the data again")
    return path


def held_by_meta(path):
    """Whether the meta.json beside a tokenizer's file names it; ValueError where its sha256 isn't the one in there."""
    folder = Path(path).parent
    if not os.path.lexists(folder / "meta.json") or (meta := read_meta(folder))["tokenizer"]["file"] != Path(path).name:
        return False
    tokenizer_file(folder, meta)
    return True


def read_ranks(path):
    """{token bytes: rank} of a tiktoken file; SystemExit naming file and line where one doesn't parse."""
    ranks, seen = {}, set()
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                token, rank = base64.b64decode(token, validate=True), int(rank)
            except ValueError:
                raise SystemExit(f"error: {path}, line {number}: not 'base64-token rank': is this a tiktoken file?") from None
            if not token or not 0 <= rank < 2**31 or token in ranks or rank in seen:
                raise SystemExit(f"error: {path}, line {number}: a token or rank that is empty, out of range, or there twice: is this a tiktoken file?")
            ranks[token] = rank
            seen.add(rank)
    if not ranks:
        raise SystemExit(f"error: {path} holds no ranks: give a tiktoken file, or a tokenizer's name")
    return ranks


def write_ranks(path, table):
    """Write a token table as a tiktoken file, which read_ranks and tiktoken read."""
    write_whole(path, *(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(table) if token))


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
    with whole_folder(out) as work:
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
    return out


def write_meta(folder, *, tokenizer, table, doc_token, shards, source, licence, **more):
    """meta.json, last of all: a folder without it is not finished. more: what pairs data says besides."""
    tokenizer = {**tokenizer, "sha256": sha256_file(Path(folder) / tokenizer["file"])}
    write_sealed(Path(folder) / "meta.json", {"tokenizer": tokenizer, "vocab_size": len(table), "doc_token": doc_token, "source": source,
                                              "licence": licence, **more, "shards": shards, "bytes_per_token": [len(token) for token in table]})


def is_index(x, end):
    return type(x) is int and 0 <= x < end  # and no bool


def is_sha256(x):
    return isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None


# key of a meta.json -> (what its value x must be, whether it is that; m: the whole, its keys above being right)
META = {
    "vocab_size": ("a number from 1 to 65,536", lambda x, m: is_index(x, 65537) and x > 0),
    "doc_token": ("a token", lambda x, m: is_index(x, m["vocab_size"])),
    "bytes_per_token": ("vocab_size numbers", lambda x, m: isinstance(x, list) and len(x) == m["vocab_size"] and all(is_index(n, 2**31) for n in x)),
    "tokenizer": ("file, a name without a folder, name, pattern and sha256", lambda x, m: isinstance(x, dict) and is_sha256(x.get("sha256")) and all(
        isinstance(x.get(key), str) for key in ("file", "name", "pattern")) and not {"/", "\\", "\0"} & set(x["file"]) and x["file"] not in ("", ".", "..")),
    "shards": ("the sha256 of each shard", lambda x, m: isinstance(x, dict) and all(isinstance(s, dict) and is_sha256(s.get("sha256")) for s in x.values()))}
META_PAIRS = {  # where there is a kind
    "kind": ("pairs or groups", lambda x, m: x in ("pairs", "groups")),
    "separator": ("a token other than doc_token", lambda x, m: is_index(x, m["vocab_size"]) and x != m["doc_token"]),
    "first_pred": ("a token behind separator and doc_token", lambda x, m: is_index(x, m["vocab_size"]) and x > max(m["separator"], m["doc_token"])),
    "keep_system": ("true or false", lambda x, m: isinstance(x, bool))}


def read_meta(folder):
    """The meta.json of a data folder; ValueError names what in it is damaged, missing or impossible."""
    file = Path(folder) / "meta.json"
    try:
        meta = read_sealed(file)
    except ValueError as e:
        raise ValueError(f"{e}; remove the folder and make the data again") from None
    for key, (what, fits) in (META | (META_PAIRS if "kind" in meta else {})).items():
        if not fits(meta.get(key), meta):
            raise ValueError(f"{file}: {key} is not {what}; remove the folder and make the data again")
    return meta
