#!/usr/bin/env bash
# The first minutes on a rented GPU: runs what decides most, without a network, in at most nine minutes. Packs all
# results into one archive after each part; benchmarks/first_gpu.py has the parts and their time limits.
#
#   scripts/first_gpu.sh --out FOLDER [--archive FILE] [--wheels FOLDER]     on the GPU machine
#   scripts/first_gpu.sh --out FOLDER --smoke                                a trial, also on a CPU
#   scripts/first_gpu.sh --collect-wheels FOLDER                             before, on a machine with a network
#   python -m benchmarks.first_gpu report FOLDER/first_gpu.tar.gz            afterwards: fills the documentation
#
# Runs with OCTAVO_PYTHON, or else python3, which must have torch. Packages that a machine with torch often lacks
# are unpacked from the wheels in --wheels (default: wheels/ beside the checkout's README.md) into a temporary
# folder. PYTHON_VERSION (default 3.12): the GPU machine's, for --collect-wheels.
set -euo pipefail

root=$(CDPATH='' cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${OCTAVO_PYTHON:-python3}
packages=(torchao==0.18.0)

die() {
  printf 'octavo: %s\n' "$*" >&2
  exit 2
}

collect_wheels() {
  local platforms=() version
  for version in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  "$python" -m pip download --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$1" "${packages[@]}"
}

wheels=$root/wheels
arguments=()
while (($#)); do
  case $1 in
    --collect-wheels)
      [[ -n ${2:-} ]] || die '--collect-wheels needs a folder'
      collect_wheels "$2"
      exit
      ;;
    --wheels)
      [[ -d ${2:-} ]] || die "--wheels: there is no folder '${2:-}'"
      wheels=$2
      shift 2
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done

"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
  die "$python has no torch; set OCTAVO_PYTHON to a Python that has"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "$wheels"/*.whl; do
  [[ -e $wheel ]] || continue
  "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH}
"$python" -m benchmarks.first_gpu run ${arguments[@]+"${arguments[@]}"}
