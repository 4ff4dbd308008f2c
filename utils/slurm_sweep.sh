#!/usr/bin/env bash
# Collect a category on a Slurm allocation: one Ray node per Slurm node, a worker per GPU, the sweep on the first node.
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 --time=12:00:00 utils/slurm_sweep.sh CATEGORY [DATASET ...]
#   MODEL="qwen2.5-0.5b" RANK="4 8" sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 utils/slurm_sweep.sh math
# The repository, with data, models and .venv, must lie on storage that all nodes share (make setup on the login node).
# PY=python3 in the environment of sbatch names another Python, which each node has; .venv is then not needed.
# A requeued or resubmitted job continues. A node that joins later gets cells then; those of a lost node are repeated.
#SBATCH --job-name=collect
#SBATCH --ntasks-per-node=1
#SBATCH --output=saves/slurm-%j.log
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch --nodes=N --gpus-per-node=G --cpus-per-gpu=C utils/slurm_sweep.sh CATEGORY [DATASET ...]" >&2
    exit 1
fi
# Slurm runs a copy of this file elsewhere, so the repository is found from the folder in which sbatch was called.
top=${SLURM_SUBMIT_DIR:?run it with sbatch, from the top of the repository}
[ -f "$top/utils/collect_all.py" ] || { echo "error: $top: call sbatch from the top of the repository" >&2; exit 1; }
python=(${PY:-"$top/.venv/bin/python"})
ray=("${python[@]}" -m ray.scripts.scripts start --block --disable-usage-stats)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')} # for this job's cluster only
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "${folder:-}"' EXIT
trap 'exit 143' TERM INT
folder=$(mktemp -d "${TMPDIR:-/tmp}/ray.XXXXXX") # a short path: Ray's sockets lie below it
"${ray[@]}" --head --node-ip-address="$head" --port="$port" --temp-dir="$folder" --include-dashboard=false >"$folder/log" 2>&1 &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" "${ray[@]}" --address="$head:$port" &
fi
for _ in $(seq 120); do
    (: >"/dev/tcp/$head/$port") 2>/dev/null && break
    sleep 1
done
RAY_ADDRESS="$head:$port" "${python[@]}" "$top/utils/collect_all.py" "$@" &
wait $!
