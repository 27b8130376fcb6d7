#!/usr/bin/env bash
# moejax on the nodes of a Slurm job.
#
#     sbatch --nodes 4 tools/launch/slurm.sh configs/deepseek_v3.py --out runs/v3
#
# Words after the script are those of `moejax train`. The folder of the submission must be one that all nodes share.
# Every option below can be given to sbatch instead. One process a node takes all of the node's GPUs; with
# --ntasks-per-node 8 each of 8 processes takes one.
#
# Before the time limit all processes get SIGTERM and the run ends after its step with a checkpoint; the same command
# goes on from there. To have several jobs in line, submit it several times with --dependency=singleton.
#
# When a node fails, or a process dies or hangs, the job goes back into the queue, and the run goes on from its newest
# checkpoint; exit codes that another attempt would not change end it. `sbatch --no-requeue` turns that off.
#
# Variables: MOEJAX, the command, if it is neither .venv/bin/moejax nor on PATH; RESTARTS, how often the job goes back
# into the queue at most (20).
#
# Tried with a stand-in for srun that sets what Slurm sets (tests/test_launch.py); not yet on a Slurm cluster.

#SBATCH --job-name=moejax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

if [ $# = 0 ]; then
  echo "usage: sbatch $0 CONFIG [--any.field value ...]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
command=${MOEJAX:-moejax}
if [ -z "${MOEJAX:-}" ] && [ -x .venv/bin/moejax ]; then
  command=.venv/bin/moejax
fi
# without a binding each process may use all cores of its node; when one process fails, the others have nothing to do
code=0
srun --cpu-bind=none --kill-on-bad-exit=1 "$command" train "$@" || code=$?
case $code in
  0 | 2 | 3 | 10 | 12 | 14 | 130) ;; # done; settings or files; no such hardware; not finite; no checkpoint; spike; interrupted
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-20}" ]; then
      scontrol requeue "$SLURM_JOB_ID" || true # which says why
    fi
    ;;
esac
exit $code
