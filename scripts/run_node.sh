#!/usr/bin/env bash
# One machine's part of a job on several: is it fit, do the machines reach each other, then ./run_train.sh.
# The same on each, with what ./run_train.sh takes: NNODES, RDZV_ENDPOINT, NODE_RANK, NGPU, CONFIG_FILE, options.
#
#   GPUS, DUMP_FOLDER, MIN_FREE_GB
#                               see health_check.sh; GPUS=0 on machines without
#   CHECK_NETWORK=0             leave the all-reduce before the start out
#   RETRY_EXIT_CODE             exit code in place of 1 and 75, for schedulers that start again by exit code
#
# Signals go on to what runs: training then saves and ends with exit code 75.
set -uo pipefail
root=$(CDPATH='' cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

child=
stopped=
# shellcheck disable=SC2329 # by the traps
forward() {
  stopped=$1
  if [[ -n $child ]]; then kill -s "$1" "$child" 2>/dev/null; fi
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

run scripts/health_check.sh || end 1
if [[ -z $stopped && ${CHECK_NETWORK:-1} != 0 ]] && ((${NNODES:-1} > 1)); then
  # shellcheck source=scripts/python_env.sh
  source scripts/python_env.sh
  find_python "$root" train
  port=$((${RDZV_ENDPOINT##*:} + 1))
  run "$OCTAVO_RESOLVED_PYTHON" -m torch.distributed.run \
    --nnodes="$NNODES" --node-rank="${NODE_RANK:-0}" --nproc-per-node="${NGPU:-1}" \
    --rdzv-backend=static --rdzv-endpoint="${RDZV_ENDPOINT%:*}:$port" \
    --rdzv-conf="timeout=${RDZV_TIMEOUT:-600}" \
    scripts/check_collectives.py || end 1
fi
[[ -z $stopped ]] || end 75 # nothing is lost: no step was made
run ./run_train.sh "$@"
end $?
