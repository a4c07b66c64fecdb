#!/usr/bin/env bash
# Train a size on several cards with Slurm, then run the notebooks, which take what was trained.
#   sbatch --nodes=1 --gpus-per-node=8 params/slurm.sh gpu base markov rollback deep
#   WEIGHTS=pretrained/seed_x_i LAUNCH=sharded sbatch --nodes=1 --gpus-per-node=8 params/slurm.sh paper rollback
# The first word names a file in params/, the others are trained in their order, each after all that it starts from.
# `optim.parts` of the params file must be a multiple of the number of cards. LAUNCH=sharded shards the weights. With
# WEIGHTS, a folder of SEED-X's, stages train SEED-X on data sets that were imported before (`nmlib data import`); a
# detokenizer among them draws with the VAE that lies, or is linked, at runs/<params>/vae, and is not sharded:
#   WEIGHTS=pretrained/seed_x_i sbatch --nodes=1 --gpus-per-node=8 params/slurm.sh paper detokenizer
#SBATCH --job-name=nmlib
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
set -euo pipefail
params=${1:?name of a file in params/}
shift

export OMP_NUM_THREADS=4
python=.venv/bin/python
launch=params/accelerate/${LAUNCH:-copies}.yaml
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
cards=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))

train() {
    srun bash -c "$python -m accelerate.commands.launch --config_file $launch \
        --num_machines $SLURM_NNODES --num_processes $cards --machine_rank \$SLURM_NODEID \
        --main_process_ip $head --main_process_port 29500 -m nmlib train --params $params $*"
}

if [ -n "${WEIGHTS:-}" ]; then
    for stage in "$@"; do
        train --stage "$stage" --weights "$WEIGHTS"
    done
    exit
fi

# data sets are drawn once, before anything is shared
for notebook in 01 02; do
    $python -m nmlib run --params "$params" --only "$notebook"
done
for stage in encoder detokenizer "$@"; do
    train --stage "$stage"
done
$python -m nmlib run --params "$params"
