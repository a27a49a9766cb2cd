"""Fetch FineWeb as GPT-2 tokens: ready-made shards from the hub, which modded-nanogpt uses too.

    python data/prepare_fineweb.py --shards 9 [--out data/fineweb10B]

This fetches the val shard and the first N train shards of kjj0/fineweb10B-gpt2. There are 103, of
100M tokens and 200 MB each. A download that broke off goes on from where it stopped. Shards that
are there are kept, so a later call with more shards adds them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import one_line, one_line_errors, progress, script_parser, sha256_file
from nanojepa.shards import read_shard, write_meta
from nanojepa.tokenizer import load_tokenizer

REPOSITORY, LAST_SHARD = "kjj0/fineweb10B-gpt2", 103


def fetch(name, out):
    """Download a shard into a folder, unless it is there."""
    from huggingface_hub import hf_hub_download  # slow to import

    if (out / name).exists():
        return
    try:
        hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=out)
    except Exception as error:  # of many kinds; what is complete is kept
        raise ValueError(
            f"{name} of {REPOSITORY} cannot be fetched ({one_line(error)}); run this again"
        ) from None


@one_line_errors()
def main(argv=None):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--shards", type=int, default=9, help="train shards to have (default: 9)")
    add("--out", type=Path, default="data/fineweb10B", help="folder to make or to add to")
    args = parser.parse_args(argv)
    if not 1 <= args.shards <= LAST_SHARD:
        raise ValueError(f"--shards {args.shards}: choose 1 to {LAST_SHARD}")
    names = ["fineweb_val_000000.bin"]
    names += [f"fineweb_train_{n:06d}.bin" for n in range(1, args.shards + 1)]
    for name in progress(names, "fetching"):
        fetch(name, args.out)
    shards = {}
    for path in progress(sorted(args.out.glob("fineweb_*.bin")), "sha256"):
        shards[path.name] = {"sha256": sha256_file(path), "tokens": len(read_shard(path))}
    write_meta(
        args.out,
        load_tokenizer("gpt2"),
        shards=shards,
        source=f"FineWeb sample, huggingface.co/datasets/{REPOSITORY}",
        licence="ODC-By 1.0",
    )
    print(f"{args.out}: {len(shards)} shards; train on it with --config configs/fineweb_124m.yaml")


if __name__ == "__main__":
    main()
