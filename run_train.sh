#!/usr/bin/env bash
# Trains a model: finds or makes a Python with torch (scripts/python_env.sh), checks the job, starts its processes.
#
#   ./run_train.sh                                                   the debug model in float8, on this machine
#   NGPU=8 CONFIG_FILE=llama3_8b.toml ./run_train.sh --training.compile
#   ./run_train.sh --help                                            every variable and every option
set -euo pipefail

here=${BASH_SOURCE[0]}
while [[ -L $here ]]; do # a link to this script works from anywhere
  target=$(readlink "$here")
  case $target in /*) here=$target ;; *) here=$(dirname "$here")/$target ;; esac
done
root=$(CDPATH='' cd -P "$(dirname "$here")" && pwd)

# shellcheck source=scripts/python_env.sh
source "$root/scripts/python_env.sh"

# A first look at the options must not cost an installation.
for argument in "$@"; do
  if [[ $argument == --help || $argument == -h ]] && ! ready "$root" train; then
    if ! find_active_python "$root" train; then OCTAVO_RESOLVED_PYTHON=$(base_python); fi
    break
  fi
done
if [[ -z ${OCTAVO_RESOLVED_PYTHON:-} ]]; then find_python "$root" train tokenizers; fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$OCTAVO_RESOLVED_PYTHON" -P -m octavo.launch "$@"
