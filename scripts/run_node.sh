#!/usr/bin/env bash
# One machine's part of a job on several: is it fit, is the job right, do the machines reach each other; then
# ./run_train.sh.
# The same on each, with what ./run_train.sh takes: NNODES, RDZV_ENDPOINT, NODE_RANK, NGPU, CONFIG_FILE, options.
#
#   GPUS, DUMP_FOLDER, MIN_FREE_GB
#                               see health_check.sh; GPUS=0 on machines without
#   CHECK_NETWORK=0             leave the all-reduce before the start out
#   RETRY_EXIT_CODE             exit code in place of 1 and 75, for schedulers that start again by exit code
#
# Exit codes are ./run_train.sh's; 1 also where the machine is not fit or does not reach the others. Signals go on to
# training, which saves and ends with exit code 75. Before it they end the check that runs, with exit code 75 as well.
set -uo pipefail
root=$(CDPATH='' cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

child=
checking= # whether `child` is one of the checks, and not training
stopped=
# shellcheck disable=SC2329 # by the traps
forward() {
  stopped=$1
  if [[ -n $child ]]; then kill -s "${checking:-$1}" "$child" 2>/dev/null; fi
}
for name in TERM INT USR1 HUP; do
  # shellcheck disable=SC2064 # the name of now
  trap "forward $name" "$name"
done

run() { # in the background, since bash handles no signal while it waits for a foreground command
  local code
  "$@" &
  child=$!
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # a signal ends `wait`, not the child
  done
  child=
  return "$code"
}

end() {
  local code=$1
  if [[ -n ${RETRY_EXIT_CODE:-} ]] && ((code == 1 || code == 75)); then
    echo "octavo: exit code $code, passed on as $RETRY_EXIT_CODE" >&2
    code=$RETRY_EXIT_CODE
  fi
  exit "$code"
}

check() { # what must succeed before training; returns its exit code
  local code
  checking=TERM # to torchrun, USR1 is no reason to end its processes
  run "$@"
  code=$?
  checking=
  [[ -z $stopped ]] || end 75 # nothing is lost: no step was made
  return "$code"
}

check scripts/health_check.sh || end 1
CHECK_ONLY=1 check ./run_train.sh "$@" || end $?
if [[ ${CHECK_NETWORK:-1} != 0 ]] && ((${NNODES:-1} > 1)); then
  # shellcheck source=scripts/python_env.sh
  source scripts/python_env.sh
  find_python "$root" train
  meeting=${RDZV_ENDPOINT%:*}:$((${RDZV_ENDPOINT##*:} + 1))
  timeout=${RDZV_TIMEOUT:-600}
  order=(--rdzv-backend=c10d) # as the machines arrive
  [[ -z ${NODE_RANK:-} ]] || order=(--rdzv-backend=static --node-rank="$NODE_RANK")
  if ! check "$OCTAVO_RESOLVED_PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" --nproc-per-node="${NGPU:-1}" "${order[@]}" \
    --rdzv-endpoint="$meeting" --rdzv-id="${RDZV_ID:-octavo}-check" \
    --rdzv-conf="timeout=$timeout,join_timeout=$timeout" \
    scripts/check_collectives.py; then
    echo "octavo: the $NNODES machines do not reach each other (all-reduces of scripts/check_collectives.py, which" \
      "meet at $meeting within $timeout s)" >&2
    end 1
  fi
fi
run ./run_train.sh "$@"
end $?
