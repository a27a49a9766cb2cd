"""Make English sentences and the regular expressions they mean: pairs, or groups of wordings.

    python data/prepare_nlregex.py [--kind pairs|groups] [--train 8000] [--test 1000] [--seed 1]
        [--out DIR]

A seeded grammar makes them, so it needs no network. train_gpt.py does it by itself if DATA_PATH is
data/nlregex (pairs) or data/nlregex_groups and missing. No regular expression and no wording of
the test split stands in train. Beside the shards lie train.jsonl and test.jsonl, for evaluate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.corpora import prepare_nlregex
from nanojepa.files import one_line_errors, script_parser, shown

HERE = Path(__file__).parent
FOLDERS = {"pairs": HERE / "nlregex", "groups": HERE / "nlregex_groups"}


@one_line_errors()
def main(argv=None):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--kind",
        choices=FOLDERS,
        default="pairs",
        help="pairs (default), or groups of three wordings of one sentence",
    )
    add("--out", help="folder to make (default: data/nlregex or data/nlregex_groups)")
    add("--train", type=int, default=8000, help="training examples (default: 8000)")
    add("--test", type=int, default=1000, help="test examples (default: 1000)")
    add("--seed", type=int, default=1, help="of the grammar's random numbers (default: 1)")
    args = parser.parse_args(argv)
    if min(args.train, args.test) < 1:
        raise ValueError("--train and --test must be at least 1")
    out = args.out or FOLDERS[args.kind]
    prepare_nlregex(out, args.kind, args.train, args.test, args.seed)
    print(f"prepared {shown(out)}: {args.train} {args.kind} to train on, {args.test} to test on")


if __name__ == "__main__":
    main()
