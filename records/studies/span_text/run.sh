#!/usr/bin/env bash
# Does the span term help on text where every token is new? Coupled and decoupled, a mid-layer tap, and AdamW for all.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1  # two runs at a time, a thread each
study=records/studies/span_text
[ ! -f $study/logs.tar.xz ] || python leaderboard.py restore $study
mkdir -p ablations  # jepa.py without its noise floor: equal states then have a direction, that of their rounding errors
sed 's/^    share = max(1e-3, .*/    share = 0.0/' jepa.py > ablations/no_floor.py
python ablate.py --name span_text --config $study/config.yaml --budget steps --jobs 2 --seeds 5 --metric val_bpb,quantized_val_bpb,jepa_matched \
  --arms JEPA_LAMBDA=0.001,0.02,0.1 --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.02" --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.1" \
  --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=1" --arm "JEPA_UPDATE=decoupled JEPA_LAMBDA=0.1 JEPA_LAYER=1" --arm "OPTIMIZER=adamw JEPA_LAMBDA=0.02" \
  --arm "JEPA_LAMBDA=0.02 jepa.py:ablations/no_floor.py"
python leaderboard.py study ablations/span_text --name span_text
