#!/bin/bash
# Runs fedexp on Slurm, one process per node; what follows the script's name goes to fedexp.main:
#
#   sbatch launch/slurm.sh --gin_file=emnist_fedadam.gin --workdir=runs/fedadam
#
# With GPUs, start one process per GPU, and do not bind GPUs to tasks (no --gpus-per-task): JAX picks
# the GPU by the process's number on its node, among all that it sees.
#
#   sbatch --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh --gin_file=...
#
#SBATCH --job-name=fedexp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# 60 s before the time limit the processes, not this script, receive SIGTERM. Make it longer where a
# round with its checkpoint takes longer. The workdir must be on a file system that all nodes share.

set -euo pipefail

if (($# == 0)); then
  echo "error: no arguments for fedexp.main; usage: sbatch $0 --gin_file=FILE --workdir=FOLDER" >&2
  exit 2
fi

export FEDEXP_DISTRIBUTED=auto
export PYTHONUNBUFFERED=1

status=0
# Since Slurm 22.05, srun no longer takes --cpus-per-task over from sbatch by itself.
srun --kill-on-bad-exit=1 --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  python -m fedexp.main "$@" || status=$?

# 143: SIGTERM ended the run, with a checkpoint. After scancel the job is no longer RUNNING.
if ((status == 143)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "launch: requeueing job $SLURM_JOB_ID, which goes on from its checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
