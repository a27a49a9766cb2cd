#!/usr/bin/env bash
# As it was run, with the source of commit 4429422: JEPA_UPDATE has been removed and data/stdlib.py renamed since.
# Does the span term help where data is short? Every arm at its own best number of steps, chosen on a held-out part of train.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1  # two runs at a time, a thread each
study=records/studies/span_short
[ ! -f $study/logs.tar.xz ] || python leaderboard.py restore $study
[ -d data/stdlib_20th_held_out ] || python data/stdlib.py --train-fraction 0.05 --held-out --out data/stdlib_20th_held_out
[ -d data/stdlib_20th ] || python data/stdlib.py --train-fraction 0.05 --out data/stdlib_20th
arms=()
for steps in 75 150 300; do  # 1, 2 and 4 epochs; 6 were 0.48 bpb worse than 3 in a first try
  arms+=(--arm "JEPA_LAMBDA=0 ITERATIONS=$steps" --arm "JEPA_LAMBDA=0.005 ITERATIONS=$steps" --arm "JEPA_LAMBDA=0.02 ITERATIONS=$steps"
         --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.1 ITERATIONS=$steps")
done
python ablate.py --name span_short_choice --config $study/config.yaml --data_path data/stdlib_20th_held_out --budget steps --jobs 2 --seeds 2 --first_seed 101 "${arms[@]}"
mapfile -t best < <(python ablate.py best ablations/span_short_choice --over ITERATIONS)
arms=()
for arm in "${best[@]}"; do
  case "$arm" in *jepa_lambda=0\ *) baseline=$arm ;; *) arms+=(--arm "$arm") ;; esac
done
python ablate.py --name span_short --config $study/config.yaml --data_path data/stdlib_20th --budget steps --jobs 2 --seeds 5 --metric val_bpb,quantized_val_bpb \
  --baseline "$baseline" "${arms[@]}"
python leaderboard.py study ablations/span_short ablations/span_short_choice --name span_short
