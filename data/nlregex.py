"""English sentences and the regular expressions they mean, from a seeded grammar: pairs, or groups of wordings of one sentence.

    python data/nlregex.py [--kind pairs|groups] [--train 8000] [--test 1000] [--seed 1] [--out DIR]

Needs no network; in the manner of NL-RX (Locascio et al., arXiv 1608.03000), & and ~ being "and" and "not". No regular
expression and no wording of the test split stands in train. Beside the shards lie train.jsonl and test.jsonl, for evaluate.py.
train_gpt.py runs this by itself where DATA_PATH is data/nlregex (pairs) or data/nlregex_groups and missing.
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.pairs import parse, prepare_pairs, record_of

# regex -> wordings of what it matches
ATOMS = {
    "[0-9]": ("a number", "a digit"), "[A-Za-z]": ("a letter", "a letter of the alphabet"), "[A-Z]": ("a capital letter", "an upper-case letter"),
    "[a-z]": ("a lower-case letter", "a small letter"), "[AEIOUaeiou]": ("a vowel", "one of the vowels"), ".": ("a character", "any character"),
    **{word: (f"the string '{word}'", f"the word '{word}'") for word in ("dog", "truck", "ring", "lake")}}
# regex of the operands -> wordings; {n} is a number from 2 to 7
UNARY = {
    ".*({x}).*": ("containing {x}", "with {x} anywhere", "having {x} somewhere"), "({x})(.*)": ("starting with {x}", "beginning with {x}"),
    "(.*)({x})": ("ending with {x}", "ending in {x}"), "~({x})": ("not {x}", "anything but {x}"), "({x})*": ("{x}, zero or more times", "{x}, any number of times"),
    "({x})+": ("{x} at least once", "one or more times {x}"), "({x}){{{n},}}": ("{x}, {n} or more times", "at least {n} times {x}"),
    "\\b({x})\\b": ("words with {x}", "words that have {x}")}
BINARY = {
    "({x})&({y})": ("{x} and {y}", "both {x} and {y}"), "({x})|({y})": ("{x} or {y}", "either {x} or {y}"),
    "({x}).*({y})": ("{x} before {y}", "{x} in front of {y}", "{x} followed by {y}")}
OPENINGS = ("lines with", "lines having", "every line with")


def draw_tree(rng, depth):
    """A random expression of at most so many levels: (regex template or atom, number, operands)."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(list(ATOMS)), 0, []
    templates = UNARY if rng.random() < 0.45 else BINARY
    return rng.choice(list(templates)), rng.randint(2, 7), [draw_tree(rng, depth - 1) for _ in range(1 if templates is UNARY else 2)]


def regex_of(tree):
    template, n, operands = tree
    return template.format(n=n, **dict(zip("xy", map(regex_of, operands)))) if operands else template


def wording_of(tree, rng):
    """One of the wordings of an expression."""
    template, n, operands = tree
    if not operands:
        return rng.choice(ATOMS[template])
    return rng.choice((UNARY | BINARY)[template]).format(n=n, **dict(zip("xy", (wording_of(t, rng) for t in operands))))


def generate(count, wordings, seed):
    """`count` times (wordings of a sentence, its regex), no wording and no regex twice."""
    rng, seen, found = random.Random(seed), set(), []
    for _ in range(100 * count):
        tree = draw_tree(rng, rng.choice((1, 2, 2, 2)))
        regex = regex_of(tree)
        texts = list(dict.fromkeys(f"{rng.choice(OPENINGS)} {wording_of(tree, rng)}" for _ in range(4 * wordings)))[:wordings]
        if regex not in seen and len(texts) == wordings and not seen.intersection(texts):
            seen.update(texts, [regex])
            found.append((texts, regex))
            if len(found) == count:
                return found
    raise SystemExit(f"error: the grammar has no {count:,} sentences of {wordings} wordings; ask for fewer")


def prepare_default(out="data/nlregex", kind=None, train=8000, test=1000, seed=1):
    """Prepare a data folder of pairs, or of groups of three wordings; kind None: by the folder's name. Returns its meta.json."""
    kind = kind or ("groups" if Path(out).name.endswith("groups") else "pairs")
    examples = generate(train + test, 3 if kind == "groups" else 1, seed)
    if kind == "groups":
        records = [{"paraphrases": texts, "code": regex} for texts, regex in examples]
    else:
        records = [record_of("pairs", None, [texts[0], regex]) for texts, regex in examples]
    lines = [json.dumps(record) + "\n" for record in records]
    parsed = [(n, *parse(record)) for n, record in enumerate(records, 1)]
    return prepare_pairs(out, parsed[:train], parsed[train:], source=f"data/nlregex.py --kind {kind} --train {train} --test {test} --seed {seed}",
                         licence="MIT", vocab_size=512, files={"train.jsonl": "".join(lines[:train]), "test.jsonl": "".join(lines[train:])})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--kind", choices=("pairs", "groups"), default="pairs", help="pairs (default), or groups of three wordings")
    parser.add_argument("--out", help="folder to make (default: data/nlregex or data/nlregex_groups)")
    parser.add_argument("--train", type=int, default=8000, help="training examples (default: 8000)")
    parser.add_argument("--test", type=int, default=1000, help="test examples (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the generator (default: 1)")
    args = parser.parse_args()
    if min(args.train, args.test) < 1:
        raise SystemExit("error: --train and --test must be at least 1")
    out = args.out or {"pairs": "data/nlregex", "groups": "data/nlregex_groups"}[args.kind]
    meta = prepare_default(out, args.kind, args.train, args.test, args.seed)
    print(f"prepared {out}: {args.train} {meta['kind']} to train on, {args.test} to test on")
