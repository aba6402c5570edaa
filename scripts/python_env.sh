# shellcheck shell=bash
# Finds or makes the Python that octavo runs with; sourced by run_train.sh, run_tests.sh and .ci/run.
#
# The order: OCTAVO_PYTHON; an active environment (VIRTUAL_ENV, then CONDA_PREFIX) with torch >= 2.11, used exactly
# as it is, so that nothing is installed and no network is needed; else .venv beside run_train.sh, made here.
#
# Making .venv costs minutes and can be interrupted at any point, so its state is one file, .venv/.octavo-ready,
# written last and by a rename: with it the environment is complete for the pyproject.toml it was made from;
# without it whatever lies there is thrown away. Only an environment that carries .octavo-made is ever thrown away:
# a .venv that someone else made is left alone.
#
# torch comes first and alone, then its exact version is a constraint on everything else, so that no dependency can
# exchange it. A machine without an NVIDIA GPU asks for the build named "+cpu"; only where the index has none does
# it take the plain version, which on Linux brings gigabytes of CUDA, and says so before the download.
#
# Written for bash 3.2 (macOS) and later. All messages go to standard error.

readonly TORCH_PIN=2.13.0

say() { printf '[octavo] %s\n' "$*" >&2; }

# die STATUS MESSAGE...: one message, each argument a line.
die() {
  local status=$1
  shift
  printf 'octavo: %s\n' "$1" >&2
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit "$status"
}

# Judges an environment by its metadata, in 0.1 s: importing torch would take seconds. Prints one line.
readonly FITNESS='
import sys

sys.path = [entry for entry in sys.path if entry]  # no module of the working directory counts
import importlib.metadata, importlib.util, re

if sys.version_info < (3, 11):
    print("unfit Python %d.%d; octavo needs Python >= 3.11" % sys.version_info[:2])
    sys.exit()
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    print("torchless")
    sys.exit()
if tuple(map(int, re.findall(r"\d+", torch)[:2])) < (2, 11):
    print("unfit torch %s; octavo needs torch >= 2.11" % torch)
    sys.exit()
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print("missing " + ", ".join(missing) if missing else "fits")
'

# Can it make .venv? Exit code 1: too old; 10: Debian has put venv, or the pip it installs, into another package.
readonly VENV_FITNESS='
import importlib.util, sys

if sys.version_info < (3, 11):
    sys.exit(1)
sys.exit(0 if all(map(importlib.util.find_spec, ("venv", "ensurepip"))) else 10)
'

# verdict PYTHON MODULE...: "fits", "torchless", "unfit WHY", "missing MODULES" or "broken".
verdict() {
  local python=$1 answer
  shift
  answer=$("$python" -c "$FITNESS" "$@" 2>/dev/null | tail -n 1) || answer=
  printf '%s' "${answer:-broken}"
}

# use_active NAME PYTHON ROOT EXTRAS MODULE...: 0 and OCTAVO_RESOLVED_PYTHON set if that environment will do, 1 if
# the search should go on, exit 2 if it has torch but lacks a package, for then installing beside it would hide
# from the user that the environment they chose is not the one used.
use_active() {
  local name=$1 python=$2 root=$3 extras=$4 answer
  shift 4
  answer=$(verdict "$python" "$@")
  case $answer in
    fits)
      OCTAVO_RESOLVED_PYTHON=$python
      return 0
      ;;
    missing*)
      die 2 "$name ($python) has a fitting torch, but not: ${answer#missing }." \
        "Install what is missing:  '$python' -m pip install -e '${root}[$extras]'" \
        "or leave that environment, and octavo makes one of its own in $root/.venv."
      ;;
    unfit*)
      if [[ $name == OCTAVO_PYTHON ]]; then
        die 2 "OCTAVO_PYTHON=$python has ${answer#unfit }." "Name another Python, or unset OCTAVO_PYTHON."
      fi
      say "$name has ${answer#unfit }: using $root/.venv instead"
      ;;
    *)
      if [[ $name == OCTAVO_PYTHON ]]; then
        case $answer in
          torchless) die 2 "OCTAVO_PYTHON=$python has no torch; octavo needs torch >= 2.11." ;;
          *) die 2 "OCTAVO_PYTHON=$python is no Python that starts." ;;
        esac
      fi
      ;;
  esac
  return 1
}

has_nvidia_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && [[ $(nvidia-smi -L 2>/dev/null) == 'GPU '* ]]
}

# What decides the installation: pyproject.toml up to its first [tool.…] table, and the pin of torch.
fingerprint() {
  { awk '/^\[tool\./ { exit } { print }' "$1/pyproject.toml" && printf '%s\n' "$TORCH_PIN"; } | cksum
}

# ready ROOT EXTRAS: is .venv complete, current, and with these extras?
ready() {
  local root=$1 want=$2 made_from='' extras='' build=''
  [[ -x $root/.venv/bin/python && -f $root/.venv/.octavo-ready ]] || return 1
  { read -r made_from && read -r extras && read -r build; } <"$root/.venv/.octavo-ready" || return 1
  [[ $made_from == "$(fingerprint "$root")" && ,$extras, == *",$want,"* ]] || return 1
  if [[ $build == cpu ]] && has_nvidia_gpu; then return 1; fi
}

# A Python to make .venv with. It is started, for a name on PATH may be a shim without anything behind it; once, and
# without its site-packages, for a start can take a second.
base_python() {
  local name status found='' problems=()
  for name in python3.13 python3.12 python3.11 python3 python; do
    found=$(command -v "$name") || continue
    status=0
    "$found" -I -S -c "$VENV_FITNESS" >/dev/null 2>&1 || status=$?
    case $status in
      0)
        printf '%s' "$found"
        return
        ;;
      10) problems+=("$found: has no venv module (Debian, Ubuntu: apt install python3-venv)") ;;
      *) problems+=("$found: does not start, or is older than 3.11") ;;
    esac
  done
  die 2 "no Python >= 3.11 with venv on PATH." ${problems[@]+"${problems[@]}"} \
    "Install one, activate an environment with torch >= 2.11, or name its Python in OCTAVO_PYTHON."
}

# pip of the environment being made. -I: the caller's PYTHONPATH must not count as installed.
pip_install() {
  PIP_USER=0 "$venv/bin/python" -I -m pip install --disable-pip-version-check --no-input "$@" </dev/null
}

install_torch() {
  local index=() quiet=(-qq) complaint=$venv/.octavo-pip-errors
  if [[ -n ${OCTAVO_TORCH_INDEX:-} ]]; then index=(--index-url "$OCTAVO_TORCH_INDEX"); fi
  if [[ -t 2 ]]; then quiet=(--progress-bar on); fi # a download of minutes needs its bar
  # --no-deps: an index for torch need not hold the rest, which the next step installs from the ordinary one.
  set -- "${quiet[@]}" --no-deps ${index[@]+"${index[@]}"}

  if [[ $build == gpu ]]; then
    # An index that has both builds would give "+cpu", which sorts above the plain version.
    say "installing torch $TORCH_PIN with CUDA (a few GB with its libraries)"
    pip_install "$@" "torch==$TORCH_PIN,!=$TORCH_PIN+cpu" >&2
    return
  fi
  if [[ $(uname -s) == Darwin ]]; then
    say "installing torch $TORCH_PIN"
    pip_install "$@" "torch==$TORCH_PIN" >&2
    return
  fi
  say "installing torch $TORCH_PIN, CPU build (about 200 MB): no NVIDIA GPU found"
  if pip_install "$@" "torch==$TORCH_PIN+cpu" 2>"$complaint" >&2; then return 0; fi
  # "(from versions: none)": the index was not reached, or has no torch for this Python. Asking again is no help.
  if ! grep -q 'No matching distribution found' "$complaint" || grep -q 'from versions: none' "$complaint"; then
    cat "$complaint" >&2
    return 1
  fi
  say "this index has no CPU build of torch $TORCH_PIN: taking the plain one, with gigabytes of CUDA libraries." \
    "OCTAVO_TORCH_INDEX=URL names another index for torch."
  pip_install "$@" "torch==$TORCH_PIN" >&2
}

install_octavo() {
  local torch
  torch=$("$venv/bin/python" -I -c 'import importlib.metadata as m; print(m.version("torch"))') || return 1
  printf 'torch==%s\n' "$torch" >"$venv/.octavo-constraints.txt"
  say "installing octavo[$extras] and what it needs, keeping torch $torch"
  pip_install -qq --constraint "$venv/.octavo-constraints.txt" --editable "${root}[$extras]" >&2
}

# make_venv ROOT EXTRAS: runs under the lock.
make_venv() {
  local root=$1 extras=$2 venv=$1/.venv build=cpu before='' base why
  if ready "$root" "$extras"; then return 0; fi # another start made it while this one waited
  if has_nvidia_gpu; then build=gpu; fi

  if [[ -f $venv/.octavo-ready && -x $venv/bin/python ]]; then
    why='its requirements have changed'
    before=$(cat "$venv/.octavo-ready")
    if [[ ,$(sed -n 2p "$venv/.octavo-ready"), == *,test,* ]]; then extras=train,test; fi
    rm -f "$venv/.octavo-ready"
  else
    why='no active environment has torch >= 2.11'
    if [[ -e $venv/.octavo-made ]]; then why='an earlier installation there was not finished'; fi
    if [[ -n $(ls -A "$venv" 2>/dev/null) && ! -e $venv/.octavo-made ]]; then
      die 2 "$venv exists, and octavo did not make it." \
        "To use it, activate it and run:  pip install -e '${root}[$extras]'" "Else move it away, and octavo makes its own."
    fi
    base=$(base_python)
    mkdir -p "$venv"
    find "$venv/" -mindepth 1 -delete # what is in it, so that a link to another disk stays one
    : >"$venv/.octavo-made"
    "$base" -m venv "$venv" >&2 </dev/null
  fi

  say "setting up $venv: $why"
  if ! install_torch || ! install_octavo; then
    # pip ended by itself and left the old packages in place; only a killed installation leaves a broken one.
    if [[ -n $before ]]; then printf '%s\n' "$before" >"$venv/.octavo-ready"; fi
    die 1 "the installation in $venv failed; pip's own message is above." \
      "It needs a package index: pip's own settings name one (PIP_INDEX_URL), OCTAVO_TORCH_INDEX one for torch alone." \
      "Without a network, activate an environment that has torch >= 2.11 and the extras [$extras]."
  fi
  printf '%s\n' "$(fingerprint "$root")" "$extras" "$build" >"$venv/.octavo-ready.new"
  mv "$venv/.octavo-ready.new" "$venv/.octavo-ready"
  say "$venv is ready"
}

# locked ROOT COMMAND...: runs it while no other start does. Without flock (macOS) a symbolic link is the lock, made
# in one step; what it points to is its owner's process number, which tells whether that owner still lives.
locked() {
  local root=$1 lock=$1/.venv.lock owner told=''
  shift
  if command -v flock >/dev/null 2>&1; then
    (
      if ! flock -n 9; then
        say "waiting for another start that is setting up $root/.venv"
        flock 9
      fi
      "$@"
    ) 9>"$lock"
    return
  fi
  until ln -s "$$" "$lock.owner" 2>/dev/null; do
    owner=$(readlink "$lock.owner") || continue
    if ! kill -0 "$owner" 2>/dev/null; then
      rm -f "$lock.owner"
      continue
    fi
    if [[ -z $told ]]; then say "waiting for another start that is setting up $root/.venv (process $owner)"; fi
    told=1
    sleep 1
  done
  (
    trap 'rm -f "$lock.owner"' EXIT
    "$@"
  )
}

# find_active_python ROOT EXTRAS MODULE...: sets OCTAVO_RESOLVED_PYTHON from what the user chose or activated.
find_active_python() {
  local root=$1 extras=$2 python name
  shift 2
  OCTAVO_RESOLVED_PYTHON=
  if [[ -n ${OCTAVO_PYTHON:-} ]]; then
    python=$(command -v -- "$OCTAVO_PYTHON") || die 2 "OCTAVO_PYTHON=$OCTAVO_PYTHON: no such program."
    use_active OCTAVO_PYTHON "$python" "$root" "$extras" "$@"
    return
  fi
  for name in VIRTUAL_ENV CONDA_PREFIX; do
    python=${!name:-}/bin/python
    if [[ -z ${!name:-} || ! -x $python ]]; then continue; fi
    if [[ -e ${!name}/.octavo-made && ${!name} -ef $root/.venv ]]; then continue; fi # ours: kept up to date below
    if use_active "$name=${!name}" "$python" "$root" "$extras" "$@"; then return 0; fi
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
    locked "$root" make_venv "$root" "$extras"
  fi
  OCTAVO_RESOLVED_PYTHON=$root/.venv/bin/python
}
