#!/bin/bash
# oarsub -S "nbs/jobs/oar.sh nbs/configs/FILE.yaml runs/NAME"
#OAR -n hiermetric
#OAR -l /nodes=1/gpu=4,walltime=08:00:00
#OAR -t besteffort
#OAR -t idempotent
#OAR --checkpoint 60
#OAR --signal 12
# best-effort jobs are killed when others need the machine; idempotent ones are then submitted again, and so is one that ends with 99
set -euo pipefail
config=$1 out=$2
gpus=$(nvidia-smi --list-gpus | wc -l)
export OMP_NUM_THREADS=$(( $(nproc) / gpus ))

again() { kill "$job"; wait "$job" || true; exit 99; }
trap again 12

accelerate launch --num_processes "$gpus" "$(command -v hiermetric)" train --config "$config" --out "$out" &
job=$!
wait "$job"
