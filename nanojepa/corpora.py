"""The embedded corpora, which need no network: Python's standard library, and NL-RX-like pairs.

stdlib: the standard library that is running, about 11 MB of code and prose; one file is one
document. nlregex: English sentences and the regular expressions they mean, from a seeded grammar
in the manner of NL-RX (Locascio et al., arXiv 1608.03000), & and ~ being "and" and "not".
nlregex_groups: groups of wordings of one such sentence.
"""

import platform
import random
import sysconfig
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nanojepa.records import Record, prepare_pairs
from nanojepa.shards import prepare

# Tests, which many installations lack, and encodings/, whose tables a script generated.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
}


# ---- the standard library


def stdlib_documents():
    """Yield every UTF-8 source file of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            yield text


def prepare_stdlib(out, vocab_size=2048, train_fraction=1.0, held_out=False):
    """Prepare the standard library in a folder; the arguments are those of shards.prepare."""
    return prepare(
        out,
        "stdlib",
        stdlib_documents,
        vocab_size=vocab_size,
        val_fraction=0.05,
        train_fraction=train_fraction,
        held_out=held_out,
        source=f"the standard library of Python {platform.python_version()}",
        licence="PSF-2.0",
    )


# ---- sentences and regular expressions

# regex -> wordings of what it matches
ATOMS = {
    "[0-9]": ("a number", "a digit"),
    "[A-Za-z]": ("a letter", "a letter of the alphabet"),
    "[A-Z]": ("a capital letter", "an upper-case letter"),
    "[a-z]": ("a lower-case letter", "a small letter"),
    "[AEIOUaeiou]": ("a vowel", "one of the vowels"),
    ".": ("a character", "any character"),
    **{
        word: (f"the string '{word}'", f"the word '{word}'")
        for word in ("dog", "truck", "ring", "lake")
    },
}
# regex of the operands -> wordings; {n} is a number from 2 to 7
UNARY = {
    ".*({x}).*": ("containing {x}", "with {x} anywhere", "having {x} somewhere"),
    "({x})(.*)": ("starting with {x}", "beginning with {x}"),
    "(.*)({x})": ("ending with {x}", "ending in {x}"),
    "~({x})": ("not {x}", "anything but {x}"),
    "({x})*": ("{x}, zero or more times", "{x}, any number of times"),
    "({x})+": ("{x} at least once", "one or more times {x}"),
    "({x}){{{n},}}": ("{x}, {n} or more times", "at least {n} times {x}"),
    "\\b({x})\\b": ("words with {x}", "words that have {x}"),
}
BINARY = {
    "({x})&({y})": ("{x} and {y}", "both {x} and {y}"),
    "({x})|({y})": ("{x} or {y}", "either {x} or {y}"),
    "({x}).*({y})": ("{x} before {y}", "{x} in front of {y}", "{x} followed by {y}"),
}
OPENINGS = ("lines with", "lines having", "every line with")


class Tree(NamedTuple):
    """A random expression: an atom, or a template with a number and operands."""

    template: str
    number: int = 0
    operands: list = []

    def regex(self):
        if not self.operands:
            return self.template
        inner = (operand.regex() for operand in self.operands)
        return self.template.format(n=self.number, **dict(zip("xy", inner, strict=False)))

    def wording(self, rng):
        """One of its wordings."""
        if not self.operands:
            return rng.choice(ATOMS[self.template])
        wording = rng.choice((UNARY | BINARY)[self.template])
        inner = (operand.wording(rng) for operand in self.operands)
        return wording.format(n=self.number, **dict(zip("xy", inner, strict=False)))


def draw_tree(rng, depth):
    """A random Tree of at most so many levels."""
    if depth == 0 or rng.random() < 0.15:
        return Tree(rng.choice(list(ATOMS)))
    templates = UNARY if rng.random() < 0.45 else BINARY
    template, number = rng.choice(list(templates)), rng.randint(2, 7)
    operands = 1 if templates is UNARY else 2
    return Tree(template, number, [draw_tree(rng, depth - 1) for _ in range(operands)])


def generate(count, wordings, seed):
    """`count` times (wordings of a sentence, its regex), no wording and no regex twice."""
    rng, seen, examples = random.Random(seed), set(), []
    for _ in range(100 * count):
        tree = draw_tree(rng, rng.choice((1, 2, 2, 2)))
        regex = tree.regex()
        texts = [f"{rng.choice(OPENINGS)} {tree.wording(rng)}" for _ in range(4 * wordings)]
        texts = list(dict.fromkeys(texts))[:wordings]
        if regex in seen or len(texts) < wordings or seen.intersection(texts):
            continue
        seen.update(texts, [regex])
        examples.append((texts, regex))
        if len(examples) == count:
            return examples
    raise ValueError(
        f"the grammar has no {count:,} sentences of {wordings} wordings; ask for fewer"
    )


def prepare_nlregex(out, kind="pairs", train=8000, test=1000, seed=1):
    """Prepare pairs, or groups of three wordings, in a folder; returns its meta.json.

    Beside the shards lie train.jsonl and test.jsonl, for evaluate.py. No regular expression and no
    wording of the test split stands in train.
    """
    examples = generate(train + test, 3 if kind == "groups" else 1, seed)
    views = [texts if kind == "groups" else [texts[0], regex] for texts, regex in examples]
    records = [Record(n, kind, None, texts) for n, texts in enumerate(views, 1)]
    return prepare_pairs(
        out,
        records[:train],
        records[train:],
        source=f"data/prepare_nlregex.py --kind {kind} --train {train} --test {test} --seed {seed}",
        licence="MIT",
        vocab_size=512,
        files={"train.jsonl": records[:train], "test.jsonl": records[train:]},
    )


# The data sets that a run makes if they are missing: DATA_PATH -> what prepares the folder.
EMBEDDED = {
    "data/stdlib": prepare_stdlib,
    "data/nlregex": prepare_nlregex,
    "data/nlregex_groups": partial(prepare_nlregex, kind="groups"),
}
