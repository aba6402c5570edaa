#!/usr/bin/env bash
# Runs the test suite, one process per core; arguments go to pytest:  ./run_tests.sh tests/float8 -k rowwise
# With --all, the long sweeps (marked slow) too: hours.
# The Python is found or made as for run_train.sh (scripts/python_env.sh), with the extra "test".
set -euo pipefail

here=${BASH_SOURCE[0]}
while [[ -L $here ]]; do # a link to this script works from anywhere
  target=$(readlink "$here")
  case $target in /*) here=$target ;; *) here=$(dirname "$here")/$target ;; esac
done
root=$(CDPATH='' cd -P "$(dirname "$here")" && pwd)

# shellcheck source=scripts/python_env.sh
source "$root/scripts/python_env.sh"
find_python "$root" train,test tokenizers pytest xdist hypothesis expecttest torchao transformers

# Tests run side by side, so each has one thread; tests/conftest.py says the same for a bare `pytest`.
export OMP_NUM_THREADS=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root"
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then
    arguments+=(-m 'slow or not slow')
  else
    arguments+=("$argument")
  fi
done
# Whole files, as what they share is made once; in the order of tests/conftest.py.
exec "$OCTAVO_RESOLVED_PYTHON" -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
  ${arguments[@]+"${arguments[@]}"}
