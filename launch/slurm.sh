#!/usr/bin/env bash
# Trains one row of a planned study per array task. A task may use several nodes.
#
#   python -m scaling_ldm.main --config experiments/dit_isoflop.py --workdir W --stages plan,encode
#   sbatch --array=0-41 --nodes=2 --gpus-per-node=8 launch/slurm.sh --config experiments/dit_isoflop.py --workdir W
#
# launch/slurm.py gives this to sbatch with the rows that are missing. W must be on a file
# system that all nodes see. The entry point finds the other processes by Slurm's
# variables. TERM and USR2 save and end a run, USR1 saves it and goes on:
# `scancel --signal=USR1 JOB`. Two tasks of one row do not run at once: the second one
# names the first and ends with status 2.
#
# A task that is preempted (exit status 75) is queued again and continues from its last
# checkpoint, however often that happens. One that lost a node (4) is, too, unless it was
# queued again SCALING_LDM_MAX_RESTARTS (100) times before, for any reason: Slurm has one
# count, in which preemptions are. With 0, no task is queued again. Any other status is
# that of the task.
#SBATCH --job-name=scaling_ldm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -uo pipefail
# Since 22.05, srun does not take this over from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
srun python -m scaling_ldm.main "$@" --stages train --run "$SLURM_ARRAY_TASK_ID"
status=$?
restarts=${SCALING_LDM_MAX_RESTARTS:-100}
before=${SLURM_RESTART_COUNT:-0}
if [ "$restarts" -gt 0 ] && { [ "$status" = 75 ] || { [ "$status" = 4 ] && [ "$before" -lt "$restarts" ]; }; }; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
elif [ "$restarts" -gt 0 ] && [ "$status" = 4 ]; then
  echo "a node was lost, and this task was queued again $before times, for any reason: it ends. launch/slurm.py starts its row anew" >&2
fi
exit "$status"
