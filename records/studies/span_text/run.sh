#!/usr/bin/env bash
# As it was run, with the source of commit 269ce99: JEPA_UPDATE has been removed since.
# Does the span term help on text where every token is new? Coupled and decoupled, a mid-layer tap, and AdamW for all.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1  # two runs at a time, a thread each
study=records/studies/span_text
[ ! -f $study/logs.tar.xz ] || python leaderboard.py restore $study
python ablate.py --name span_text --config $study/config.yaml --budget steps --jobs 2 --seeds 5 --metric val_bpb,quantized_val_bpb,jepa_matched \
  --arms JEPA_LAMBDA=0.001,0.02,0.1 --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.02" --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.1" \
  --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=1" --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.1 JEPA_LAYER=1" --arm "OPTIMIZER=adamw JEPA_LAMBDA=0.02"
python leaderboard.py study ablations/span_text --name span_text
