#!/bin/bash
# ImageNet, Table 5's student, on 2 nodes of 8 GPUs: sbatch docs/slurm.sh
#SBATCH --job-name=at-resnet18
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# One torchrun per node. SIGTERM, two minutes before the end, makes the run save and stop; requeued, it resumes.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head_node:29400" --rdzv-id="$SLURM_JOB_ID" \
    train.py --recipe recipes/table5/at.yaml --data-dir "$IMAGENET" \
    --teacher-checkpoint "$TEACHER" \
    --amp bf16 --channels-last true --workers 7 --checkpoint-every 500 --output-dir "$OUTPUT"

# Slurm itself requeues after a node has failed, not after the time limit.
if [ ! -e "$OUTPUT/summary.json" ] && [ "$(date +%s)" -gt $((SLURM_JOB_END_TIME - 180)) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
