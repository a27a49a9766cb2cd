"""Pairs of texts and groups of paraphrases: lines of JSON, and the token shards made of them.

A line is {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}, whose user
message is Text and whose assistant message is Code, or {"paraphrases": [text, text, ...]}. Other
forms that people have are read as one of these (FORMS). A file is of one kind, pairs or groups.

In a shard an example is marker, view, separator, view, and so on.
"""

import itertools
import json
import reprlib
import sys
from typing import NamedTuple

from nanojepa.files import progress, whole_folder, write_whole
from nanojepa.readers import open_rows
from nanojepa.shards import digest, hold_out, read_meta, write_folder
from nanojepa.tokenizer import load_tokenizer, train_bpe

PRED_TOKENS = 10  # [PRED] tokens in the vocabulary of pairs; JEPA_PRED_TOKENS uses the first ones


class Record(NamedTuple):
    """One line: its number, "pairs" or "groups", the system message or None, and the texts.

    The views of a pair are Text and Code.
    """

    line: int
    kind: str
    system: str | None
    views: list

    def to_json(self):
        """The JSON object that parse reads as this record."""
        if self.kind == "groups":
            return {"paraphrases": self.views}
        roles = [] if self.system is None else [("system", self.system)]
        roles += zip(("user", "assistant"), self.views, strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in roles]}


def jsonl(records):
    """The lines, bytes, that read_examples reads as these Records."""
    return "".join(json.dumps(record.to_json()) + "\n" for record in records).encode()


# ---- one line


def check_text(text, name):
    """The text; ValueError if it is none, or blank, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a text")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which has no UTF-8 form") from None
    return text


def parse(line, row, columns=None):
    """The Record of a row, a dict; ValueError says what is wrong with it.

    columns: the names of the columns that hold Text and Code; without them, one of FORMS is found.
    """
    if columns:
        missing = [name for name in columns if name not in row]
        if missing:
            raise ValueError(f"no column {missing[0]} among {', '.join(map(repr, row))}")
        return pair_of_columns(line, row, *columns)
    form = form_of(row)
    if form is None:
        raise ValueError(
            f"its columns {reprlib.repr(list(row))} are neither messages nor paraphrases nor "
            "another known form (docs/data.md); name those of the two texts"
        )
    return FORMS[form](line, row)


def form_of(row):
    """The key in FORMS of a row, or None."""
    return next((form for form in FORMS if all(name in row for name in form)), None)


def group_of_paraphrases(line, row):
    texts = row["paraphrases"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError("paraphrases: a group needs at least two texts")
    views = [check_text(text, f"paraphrases[{i}]") for i, text in enumerate(texts)]
    return Record(line, "groups", None, views)


def pair_of_messages(line, row, key="messages", role="role", content="content"):
    """A conversation of one user and one assistant message, after at most one system message."""
    messages = row[key]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{key} is no list of messages")
    roles = [ROLES.get(str(message.get(role)), message.get(role)) for message in messages]
    if roles not in (["system", "user", "assistant"], ["user", "assistant"]):
        raise ValueError(
            f"roles {reprlib.repr(roles)}: there must be one user and one assistant message, after "
            "at most one system message"
        )
    texts = [
        text_of_parts(message.get(content), name)
        for name, message in zip(roles, messages, strict=True)
    ]
    system = texts[0] if len(texts) == 3 else None
    if system not in (None, ""):
        check_text(system, "system")
    views = [check_text(text, name) for text, name in zip(texts[-2:], roles[-2:], strict=True)]
    return Record(line, "pairs", system, views)


def text_of_parts(content, name):
    """The text of a content, which may be a list of parts: {"type": "text", "text": ...}."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{name} has a part that is no text ({reprlib.repr(kind)})")
        texts.append(part["text"])
    if not texts:
        raise ValueError(f"{name} has no parts")
    return "".join(texts)


def pair_of_sharegpt(line, row):
    """As messages; its keys are from and value, and its roles human and gpt."""
    turns = row["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else {}
    if isinstance(first, dict) and "role" in first:
        return pair_of_messages(line, row, "conversations")
    return pair_of_messages(line, row, "conversations", "from", "value")


def pair_of_alpaca(line, row):
    """The instruction, with what it is about after it, and the output."""
    parts = [check_text(row["instruction"], "instruction")]
    if row.get("input"):
        parts.append(check_text(row["input"], "input"))
    output, system = check_text(row["output"], "output"), row.get("system")
    if system:
        check_text(system, "system")
    return Record(line, "pairs", system or None, ["\n\n".join(parts), output])


def pair_of_columns(line, row, text, code):
    """Two columns of texts; or of lists of messages, which together are a conversation."""
    sides = [row[text], row[code]]
    if all(isinstance(side, list) for side in sides):
        return pair_of_messages(line, {"messages": sides[0] + sides[1]})
    if isinstance(sides[1], list) and all(isinstance(side, str) for side in sides[1]):
        sides[1] = "; ".join(sides[1])  # several right answers, as LLM-JEPA's data have them
    views = [check_text(side, name) for side, name in zip(sides, (text, code), strict=True)]
    return Record(line, "pairs", None, views)


def columns_of(*names):
    return lambda line, row: pair_of_columns(line, row, *names)


# Roles that others have for user, assistant and system.
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
# The forms of rows. A row has the first form whose columns it has.
FORMS = {
    ("paraphrases",): group_of_paraphrases,
    ("messages",): pair_of_messages,
    ("conversations",): pair_of_sharegpt,
    ("instruction", "output"): pair_of_alpaca,
    **{
        names: columns_of(*names)
        for names in (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("question", "answer"),
            ("text", "code"),
        )
    },
}
OURS = (("paraphrases",), ("messages",))


# ---- a file or a data set


def read_rows(items, make, place, bad="stop"):
    """[make(number, item)] of numbered items.

    bad: an item of which make raises ValueError stops it all, or is skipped and counted ("skip");
    either way it is named.
    """
    made, skipped = [], 0
    for number, item in items:
        try:
            made.append(make(number, item))
        except ValueError as error:
            if bad == "stop":
                raise ValueError(
                    f"{place}, line {number}: {error}; mend it, or skip such lines with --bad skip"
                ) from None
            skipped += 1
            print(f"{place}, line {number}: skipped: {error}", file=sys.stderr)
    if skipped:
        print(f"{place}: {skipped} of {skipped + len(made)} lines skipped", file=sys.stderr)
    if not made:
        raise ValueError(f"{place} holds no usable line")
    return made


def check_kinds(records, place):
    """The Records; ValueError if they are of both kinds."""
    for record in records:
        if record.kind != records[0].kind:
            other = "paraphrases" if record.kind == "groups" else "messages"
            raise ValueError(
                f"{place}, line {record.line}: {other} among lines of the other kind; "
                "make a file of each"
            )
    return records


def recorder(place, columns=None):
    """make() for read_rows: the Record of a row. The first form that isn't ours is said."""
    said = set()

    def make(number, row):
        form = tuple(columns or ()) or form_of(row)
        if form and form not in OURS and not said:
            print(f"{place}: read by its columns {', '.join(form)}", file=sys.stderr)
            said.add(form)
        return parse(number, row, columns)

    return make


def read_examples(path, bad="stop", limit=None, columns=None):
    """The Records of the first `limit` rows of a file (readers.py); columns: as for parse()."""
    rows, record = open_rows(path), recorder(path, columns)
    items = itertools.islice(rows.items, limit)
    records = read_rows(items, lambda n, raw: record(n, rows.parse(raw)), str(path), bad)
    return check_kinds(records, path)


def read_dataset(dataset, place, bad="stop", limit=None, columns=None):
    """The Records of the first `limit` rows of a Hugging Face dataset."""
    items = enumerate(itertools.islice(dataset, limit), 1)
    return check_kinds(read_rows(items, recorder(place, columns), place, bad), place)


# ---- train and test


def split_examples(records, test_fraction):
    """(train, test), by the hash of the first view, so that copies of it are on one side."""
    digests = [digest(record.views[0]) for record in records]
    held_out = set(hold_out(digests, test_fraction)[0])
    if not held_out:
        raise ValueError("fewer than two different texts: there is nothing to split; give --test")
    train, test = [], []
    for record, own in zip(records, digests, strict=True):
        (test if own in held_out else train).append(record)
    return train, test


def seen_in_train(train, test, kind):
    """[[whether this view stands in train, for each view] for each example of test].

    train, test: lists of views. A text is compared with texts and a code with codes; a paraphrase
    with any.
    """
    if kind == "pairs":
        known = [set(side) for side in zip(*train, strict=True)]
        return [[v in side for v, side in zip(views, known, strict=True)] for views in test]
    known = {view for views in train for view in views}
    return [[view in known for view in views] for views in test]


def count_overlap(train, test, kind):
    """What meta.json says of test examples that stand in train; clean ones have no view there."""
    seen = seen_in_train(train, test, kind)
    overlap = {"examples": len(test)}
    if kind == "pairs":
        overlap["texts"], overlap["codes"] = (sum(side) for side in zip(*seen, strict=True))
    return overlap | {"clean": sum(not any(views) for views in seen)}


def full_views(record, keep_system):
    """The views of a record, the first with the system message before it if that is kept."""
    _, _, system, views = record
    if not keep_system or not system:
        return views
    return [f"{system}\n{views[0]}", *views[1:]]


def encode_views(views, encoding):
    """The tokens of an example; the separator is the token after the marker."""
    tokens = []
    for view in views:
        mark = encoding.n_vocab if tokens else encoding.eot_token
        tokens += [mark, *encoding.encode_ordinary(view)]
    return tokens


def prepare_pairs(
    out,
    train,
    test,
    *,
    source,
    licence="unknown",
    system="auto",
    vocab_size=None,
    tokenizer=None,
    files=None,
):
    """Tokenise Records into the folder `out`, which appears whole or not at all: its meta.json.

    system: "keep" the system message before Text, "drop" it, or keep it if it differs among the
    training examples ("auto"). tokenizer: a tiktoken name or a file of ranks; without it, BPE of
    vocab_size tokens is trained on train. The separator and the [PRED] tokens come on top.
    files: {name: Records} to put beside the shards as lines of JSON.
    """
    kinds = {kind for _, kind, _, _ in train + test}
    if len(kinds) > 1:
        raise ValueError("train and test are of different kinds, pairs and groups; give one kind")
    kind = kinds.pop()
    systems = {system for _, _, system, _ in train}
    keep = system == "keep" or (system == "auto" and len(systems) > 1)
    train, test = ([full_views(record, keep) for record in records] for records in (train, test))
    with whole_folder(out) as work:
        texts = itertools.chain.from_iterable(train)
        encoding = load_tokenizer(tokenizer) if tokenizer else train_bpe(texts, vocab_size)
        separator = encoding.n_vocab
        for name, records in (files or {}).items():
            write_whole(work / name, jsonl(records))
        encoded = {
            split: (encode_views(v, encoding) for v in progress(views, f"tokenising {split}"))
            for split, views in (("train", train), ("val", test))
        }
        write_folder(
            work,
            "pairs",
            encoded,
            encoding,
            source=source,
            licence=licence,
            extra_tokens=1 + PRED_TOKENS,
            kind=kind,
            separator=separator,
            first_pred=separator + 1,
            keep_system=keep,
            overlap=count_overlap(train, test, kind),
        )
    return read_meta(out)
