#!/usr/bin/env bash
# As it was run, with the source of commit 4429422: data/pairs.py has been renamed since.
# NTP, pair and span on a quarter and a sixteenth of NL-RX-SYNTH, lambda chosen on a held-out tenth of train.
# Arguments: the train and the test file, JSON lines of messages (8,000 and 2,000 pairs).
set -euo pipefail
root="$(dirname "$0")/../../.."
mkdir -p "$root/data/synth"  # one name for them on every machine
cp "$1" "$root/data/synth/train.jsonl"
cp "$2" "$root/data/synth/test.jsonl"
cd "$root"
train=data/synth/train.jsonl test=data/synth/test.jsonl
export OMP_NUM_THREADS=1  # two runs at a time, a thread each
study=records/studies/nlregex grids=()
[ ! -f $study/logs.tar.xz ] || python leaderboard.py restore $study
for share in 4 16; do
  fraction=$(python -c "print(1 / $share)") data=data/synth_$share name=nlregex_$share
  [ -d ${data}_held_out ] || python data/pairs.py --train "$train" --test-fraction 0.1 --train-fraction $fraction --out ${data}_held_out
  [ -d $data ] || python data/pairs.py --train "$train" --test "$test" --train-fraction $fraction --out $data
  common=(--config $study/config.yaml --budget flops --jobs 2)
  python ablate.py --name ${name}_choice "${common[@]}" --data_path ${data}_held_out --seeds 2 --first_seed 101 --metric val_loss \
    --arm "JEPA_OBJECTIVE=pair JEPA_LAMBDA=0.1" --arm "JEPA_OBJECTIVE=pair JEPA_LAMBDA=0.5" --arm "JEPA_OBJECTIVE=span JEPA_LAMBDA=0.02" --arm "JEPA_OBJECTIVE=span JEPA_LAMBDA=0.1"
  mapfile -t best < <(python ablate.py best ablations/${name}_choice --over JEPA_LAMBDA)
  arms=()
  for arm in "${best[@]}"; do arms+=(--arm "$arm"); done
  python ablate.py --name $name "${common[@]}" --data_path $data --seeds 5 --evaluate "$test" --metric startswith,startswith_clean,val_loss "${arms[@]}"
  grids+=(ablations/$name ablations/${name}_choice)
done
python leaderboard.py study "${grids[@]}" --name nlregex
