#!/bin/bash
# Near-policy distillation over SLURM nodes: one Ray node each, then `npd run` on the first.
#   sbatch examples/slurm.sh run.yaml
# The folder it is submitted from must be on a file system that all nodes share. Submit it again to
# resume. Slurm sends SIGTERM before the time is up: npd then drains, saves and exits, and can be resumed.
#SBATCH --job-name=npd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
set -euo pipefail
config=${1:?usage: sbatch slurm.sh CONFIG}

# A key for this Ray only; nodes and npd read it from their environment.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32) RAY_USAGE_STATS_ENABLED=0
port=$((20000 + SLURM_JOB_ID % 20000))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}'):$port

# `--block` keeps each node's Ray in its job step, so that Slurm ends it with the job.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray start --head --port="$port" --include-dashboard=false --block &
sleep 20
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --address="$address" --block &
    sleep 20
fi

directory=$(python -c "import sys, npd.config.load as s; print(s.load_config(sys.argv[1]).config.directory)" "$config")
resume=()
if [ -e "$directory/config.json" ]; then resume=(--resume); fi
npd run "$config" "${resume[@]}" \
    --set runtime.kind=ray --set runtime.ray.address="$address" --set runtime.threads=4 &
run=$!
trap 'kill -TERM $run' TERM
# Once more, because the signal ends the first wait.
wait $run || { wait $run; exit $?; }
