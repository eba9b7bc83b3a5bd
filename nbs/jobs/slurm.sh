#!/bin/bash
# sbatch nbs/jobs/slurm.sh nbs/configs/FILE.yaml runs/NAME
#SBATCH --job-name=hiermetric
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue               # back into the queue after pre-emption
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60      # and a minute before the time is over
set -euo pipefail
config=$1 out=$2
gpus=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$(( ${SLURM_CPUS_PER_TASK:-8} / gpus ))

again() { scontrol requeue "$SLURM_JOB_ID"; kill "$job"; wait "$job" || true; exit 0; }
trap again USR1

srun bash -c 'accelerate launch --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$0" \
    --main_process_ip "$1" --main_process_port 29500 "$(command -v hiermetric)" train --config "$2" --out "$3"' \
    $(( SLURM_NNODES * gpus )) "$head" "$config" "$out" &
job=$!
wait "$job"
