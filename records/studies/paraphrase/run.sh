#!/usr/bin/env bash
# As it was run, with the source of commit 4429422: data/pairs.py has been renamed since.
# Pretraining on paraphrases with and without the pair term, then Rotten Tomatoes fine-tuning of both without it.
# Arguments: paraphrase train and test files (JSON lines of paraphrases), Rotten Tomatoes train and test files (of messages).
set -euo pipefail
root="$(dirname "$0")/../../.."
mkdir -p "$root/data/files"  # one name for them on every machine
cp "$1" "$root/data/files/paraphrase_train.jsonl"
cp "$2" "$root/data/files/paraphrase_test.jsonl"
cp "$3" "$root/data/files/reviews_train.jsonl"
cp "$4" "$root/data/files/reviews_test.jsonl"
cd "$root"
train=data/files/paraphrase_train.jsonl test=data/files/paraphrase_test.jsonl reviews=data/files/reviews_train.jsonl review_test=data/files/reviews_test.jsonl
export OMP_NUM_THREADS=1  # two runs at a time, a thread each
study=records/studies/paraphrase
[ ! -f $study/logs.tar.xz ] || python leaderboard.py restore $study
for run in logs/paraphrase-*; do  # what was restored has no weights to go on from
  [ ! -d "$run" ] || [ -f "$run/model.safetensors" ] || rm -r "$run"
done
[ -d data/paraphrase ] || python data/pairs.py --train "$train" --test "$test" --out data/paraphrase
[ -d data/rotten_tomatoes ] || python data/pairs.py --train "$reviews" --test "$review_test" --tokenizer data/paraphrase/tokenizer.tiktoken --out data/rotten_tomatoes
python ablate.py --name paraphrase --config $study/config.yaml --data_path data/paraphrase --budget flops --jobs 2 --seeds 5 --metric val_loss,jepa_matched,jepa_shuffled --arms JEPA_LAMBDA=0.1,0.5
python - <<'END'
import json, pathlib
for run in json.load(open("ablations/paraphrase/result.json"))["runs"]:  # a name by arm and seed for each pretrained model
    link = pathlib.Path("logs") / f"pretrained-{run['arm'].split('=')[1]}-seed{run['seed']}"
    link.unlink(missing_ok=True)
    link.symlink_to(run["run"])
END
python ablate.py --name rotten_tomatoes --config $study/rotten.yaml --data_path data/rotten_tomatoes --budget steps --jobs 2 --seeds 5 --evaluate "$review_test" --metric startswith,val_loss \
  --baseline "INIT_FROM=logs/pretrained-0-seed{seed}" --arm "INIT_FROM=logs/pretrained-0.1-seed{seed}" --arm "INIT_FROM=logs/pretrained-0.5-seed{seed}"
python leaderboard.py study ablations/paraphrase ablations/rotten_tomatoes --name paraphrase
