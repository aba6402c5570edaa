# shellcheck shell=bash
# Finds or makes the Python that octavo runs with; sourced by run_train.sh, run_tests.sh and .ci/run.
#
# The order: OCTAVO_PYTHON; an active environment (VIRTUAL_ENV, then CONDA_PREFIX) with torch >= 2.11, used exactly
# as it is, so that nothing is installed and no network is needed; else .venv beside run_train.sh, made here by uv if
# there is one, else by venv and pip.
#
# Making .venv costs minutes and can be interrupted at any point. Its last step writes .venv/.octavo-ready, with what
# it was made from and for; without that file it is made anew. A .venv without .octavo-made is someone else's, and is
# left alone. Written for bash 3.2 (macOS) and later. All messages go to standard error.

readonly TORCH_PIN=2.13.0

say() { printf '[octavo] %s\n' "$*" >&2; }

# die STATUS MESSAGE...: one message, each argument a line.
die() {
  printf 'octavo: %s\n' "$2" >&2
  if (($# > 2)); then printf '  %s\n' "${@:3}" >&2; fi
  exit "$1"
}

# Says why a Python does not fit, by its packages' metadata: importing torch would take seconds.
readonly FITNESS='
import sys
sys.path = [entry for entry in sys.path if entry]  # no module of the working directory counts
import importlib.metadata, importlib.util, re
if sys.version_info < (3, 11):
    sys.exit(print("Python %d.%d; octavo needs Python >= 3.11" % sys.version_info[:2]) or 1)
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit(print("no torch") or 1)
if tuple(map(int, re.findall(r"\d+", torch)[:2])) < (2, 11):
    sys.exit(print("torch", torch + "; octavo needs torch >= 2.11") or 1)
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit(print("missing " + ", ".join(missing)) or 1 if missing else 0)
'

# use_python NAME PYTHON ROOT EXTRAS MODULE...: 0 and OCTAVO_RESOLVED_PYTHON set if it will do, 1 if the search should
# go on. One with torch that lacks a package is an error: the user chose it, and must know that it is not used.
use_python() {
  local name=$1 python=$2 root=$3 extras=$4 why
  if why=$("$python" -c "$FITNESS" "${@:5}" 2>/dev/null); then
    OCTAVO_RESOLVED_PYTHON=$python
    return 0
  elif [[ $why == missing* ]]; then
    die 2 "$name ($python) has a fitting torch, but not: ${why#missing }." \
      "Install what is missing:  '$python' -m pip install -e '${root}[$extras]'" \
      "or leave that environment, and octavo makes one of its own in $root/.venv."
  elif [[ $name == OCTAVO_PYTHON ]]; then
    die 2 "OCTAVO_PYTHON=$python has ${why:-no Python that starts}." "Name another Python, or unset OCTAVO_PYTHON."
  elif [[ $why == *needs* ]]; then
    say "$name has $why: using $root/.venv instead"
  fi
  return 1
}

has_nvidia_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && [[ $(nvidia-smi -L 2>/dev/null) == 'GPU '* ]]
}

# What decides the installation: pyproject.toml up to its first [tool.…] table, and the pin of torch.
fingerprint() {
  { awk '/^\[tool\./ { exit } { print }' "$1/pyproject.toml" && printf '%s\n' "$TORCH_PIN"; } | cksum
}

# ready ROOT EXTRAS: is .venv complete, current, with these extras, and with CUDA if there is a GPU?
ready() {
  local made_from='' extras='' build=''
  [[ -x $1/.venv/bin/python && -f $1/.venv/.octavo-ready ]] || return 1
  { read -r made_from && read -r extras && read -r build; } <"$1/.venv/.octavo-ready" || return 1
  [[ $made_from == "$(fingerprint "$1")" && ,$extras, == *",$2,"* ]] || return 1
  if [[ $build == cpu ]] && has_nvidia_gpu; then return 1; fi
}

# A Python >= 3.11 with venv. It is started, for a name on PATH may be a shim without anything behind it.
base_python() {
  local name found
  for name in python3.13 python3.12 python3.11 python3 python; do
    found=$(command -v "$name") || continue
    if "$found" -ISc 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s' "$found"
      return
    fi
  done
  die 2 "no Python >= 3.11 with venv on PATH." \
    "Install one (Debian, Ubuntu: apt install python3 python3-venv), activate an environment with torch >= 2.11, or" \
    "name its Python in OCTAVO_PYTHON."
}

has_uv() { command -v uv >/dev/null 2>&1; }

# Installs into the environment being made. -I: the caller's PYTHONPATH must not count as installed.
install() {
  if has_uv; then
    uv pip install --python "$venv/bin/python" "$@" >&2
  else
    PIP_USER=0 "$venv/bin/python" -I -m pip install --disable-pip-version-check --no-input "$@" </dev/null >&2
  fi
}

# torch comes first and alone, perhaps from an index of its own. Without a GPU that is the build named "+cpu"; only
# where the index has none is it the plain version, which on Linux brings gigabytes of CUDA.
install_torch() {
  local options=(-q --no-deps) log=$venv/.octavo-torch.log
  if [[ -n ${OCTAVO_TORCH_INDEX:-} ]]; then options+=(--index-url "$OCTAVO_TORCH_INDEX"); fi
  if [[ $build == gpu ]]; then
    torch="torch==$TORCH_PIN,!=$TORCH_PIN+cpu" # an index with both builds would give "+cpu", which sorts higher
  elif [[ $(uname -s) == Darwin ]]; then
    torch="torch==$TORCH_PIN"
  else
    torch="torch==$TORCH_PIN+cpu"
  fi
  say "installing $torch"
  if install "${options[@]}" "$torch" 2>"$log"; then return 0; fi
  cat "$log" >&2
  if [[ $torch != *==*+cpu ]] || ! grep -Eq "versions: [0-9]|no version of torch" "$log"; then return 1; fi
  say "this index has no CPU build of torch $TORCH_PIN: taking the plain one, with gigabytes of CUDA libraries." \
    "OCTAVO_TORCH_INDEX=URL names another index for torch."
  torch="torch==$TORCH_PIN"
  install "${options[@]}" "$torch"
}

# make_venv ROOT EXTRAS: runs under the lock.
make_venv() {
  local root=$1 extras=$2 venv=$1/.venv build=cpu torch base
  if ready "$root" "$extras"; then return 0; fi # another start made it while this one waited
  if has_nvidia_gpu; then build=gpu; fi
  if [[ -n $(ls -A "$venv" 2>/dev/null) && ! -e $venv/.octavo-made ]]; then
    die 2 "$venv exists, and octavo did not make it." \
      "To use it, activate it and run:  pip install -e '${root}[$extras]'" "Else move it away, and octavo makes its own."
  fi
  say "setting up $venv"
  if [[ -f $venv/.octavo-ready && -x $venv/bin/python ]]; then # complete, but for other requirements
    if [[ ,$(sed -n 2p "$venv/.octavo-ready"), == *,test,* ]]; then extras=train,test; fi
    rm "$venv/.octavo-ready"
  else
    if ! has_uv; then base=$(base_python); fi
    mkdir -p "$venv"
    find "$venv/" -mindepth 1 -delete # what is in it, so that a link to another disk stays one
    : >"$venv/.octavo-made"
    if has_uv; then uv venv -q --allow-existing --python '>=3.11' "$venv" >&2; else "$base" -m venv "$venv" >&2; fi
  fi
  # With torch named again, no other package can exchange it.
  if ! install_torch || ! install -q --editable "${root}[$extras]" "$torch"; then
    die 1 "the installation in $venv failed; the installer's own message is above." \
      "It needs a package index: PIP_INDEX_URL (UV_INDEX_URL) names one, OCTAVO_TORCH_INDEX one for torch alone." \
      "Without a network, activate an environment that has torch >= 2.11 and the extras [$extras]."
  fi
  printf '%s\n' "$(fingerprint "$root")" "$extras" "$build" >"$venv/.octavo-ready.new"
  mv "$venv/.octavo-ready.new" "$venv/.octavo-ready"
  say "$venv is ready"
}

# find_active_python ROOT EXTRAS MODULE...: sets OCTAVO_RESOLVED_PYTHON from what the user chose or activated.
find_active_python() {
  local root=$1 python name
  OCTAVO_RESOLVED_PYTHON=
  if [[ -n ${OCTAVO_PYTHON:-} ]]; then
    python=$(command -v -- "$OCTAVO_PYTHON") || die 2 "OCTAVO_PYTHON=$OCTAVO_PYTHON: no such program."
    use_python OCTAVO_PYTHON "$python" "$@"
    return
  fi
  for name in VIRTUAL_ENV CONDA_PREFIX; do
    python=${!name:-}/bin/python
    if [[ -z ${!name:-} || ! -x $python ]]; then continue; fi
    if [[ -e ${!name}/.octavo-made && ${!name} -ef $root/.venv ]]; then continue; fi # ours: kept up to date below
    if use_python "$name=${!name}" "$python" "$@"; then return 0; fi
  done
  return 1
}

# find_python ROOT EXTRAS MODULE...: sets OCTAVO_RESOLVED_PYTHON to a Python that has torch, the extras (in a .venv
# of ours) or at least the modules (in the user's own environment).
# shellcheck disable=SC2034 # it is read by the scripts that source this one
find_python() {
  local root=$1 extras=$2
  if find_active_python "$@"; then return; fi
  if ! ready "$root" "$extras"; then
    if [[ ! -w $root ]]; then
      die 2 "no active environment has torch >= 2.11, and $root cannot be written to, so octavo cannot make its own." \
        "Activate an environment that has it, or name its Python in OCTAVO_PYTHON."
    fi
    (
      if command -v flock >/dev/null 2>&1; then # two starts at once; macOS has no flock
        flock -n 9 || { say "waiting for another start that is setting up $root/.venv" && flock 9; }
      fi
      make_venv "$root" "$extras"
    ) 9>>"$root/.venv.lock"
  fi
  OCTAVO_RESOLVED_PYTHON=$root/.venv/bin/python
}
