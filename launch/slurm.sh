#!/usr/bin/env bash
# Trains one row of a planned study per array task. A task may use several nodes.
#
#   python -m scaling_ldm.main --config experiments/dit_isoflop.py --workdir W --stages plan,encode
#   sbatch --array=0-41 --nodes=2 --gpus-per-node=8 launch/slurm.sh experiments/dit_isoflop.py W
#
# W must be on a file system that all nodes see. The entry point finds the other processes
# by Slurm's variables. A task that is preempted (exit status 75) is queued again and
# continues from its last checkpoint. TERM and USR2 save and end a run, USR1 saves it and
# goes on: `scancel --signal=USR1 JOB`. Two tasks of one row do not run at once:
# the second one names the first and ends with status 2.
#SBATCH --job-name=scaling_ldm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -uo pipefail
srun python -m scaling_ldm.main --config "$1" --workdir "$2" --stages train --run "$SLURM_ARRAY_TASK_ID"
status=$?
if [ "$status" = 75 ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; fi
exit "$status"
