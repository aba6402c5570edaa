#!/usr/bin/env bash
# Is this machine fit for its part of a job? Says everything that is wrong with it; exit code 1 if anything is.
#
#   GPUS           GPUs that must be there, whole and idle (default: NGPU, else 0)
#   DUMP_FOLDER    where checkpoints go (default: outputs)
#   MIN_FREE_GB    space that must be free there (default: 50)
#   RDZV_ENDPOINT  host:port where the machines meet; the host must have an address
#   RDZV_TIMEOUT   seconds until then (default: 600): under Kubernetes a name appears some time after its pod starts
set -uo pipefail

gpus=${GPUS:-${NGPU:-0}}
folder=${DUMP_FOLDER:-outputs}
min_free_gb=${MIN_FREE_GB:-50}
host=${RDZV_ENDPOINT:-}
host=${host%:*}
timeout=${RDZV_TIMEOUT:-600}
[[ $timeout =~ ^[0-9]{1,6}$ ]] || timeout=0 # ./run_train.sh says what is wrong with it
problems=()

if ((gpus > 0)); then
  if ! listing=$(timeout 60 nvidia-smi -L 2>&1); then
    problems+=("nvidia-smi fails: $(head -n 1 <<<"$listing")")
  else
    present=$(grep -c '^GPU ' <<<"$listing" || true)
    ((present >= gpus)) || problems+=("$present GPUs are visible, of $gpus")
    errors=$(timeout 60 nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total \
      --format=csv,noheader,nounits 2>/dev/null | awk -F', ' '$2 + 0 > 0 { print "GPU " $1 ": " $2 }')
    [[ -z $errors ]] || problems+=("memory errors that were not corrected: ${errors//$'\n'/, }; reset or replace it")
    busy=$(timeout 60 nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null | tr '\n' ' ')
    [[ -z ${busy// /} ]] || problems+=("GPUs are in use already, by the processes $busy")
  fi
  shared=$(df --output=avail -B1M /dev/shm 2>/dev/null | tail -n 1)
  ((${shared:-0} >= 1024)) || problems+=("/dev/shm has ${shared:-no} MB; NCCL wants 1024 (a container: a volume in memory)")
fi

mkdir -p "$folder" 2>/dev/null
if ! probe=$(mktemp "$folder/.octavo-probe.XXXXXX" 2>&1); then
  problems+=("$folder cannot be written")
else
  rm -f "$probe"
  free=$(df --output=avail -B1G "$folder" | tail -n 1)
  ((free >= min_free_gb)) || problems+=("$folder has ${free// /} GB free, of $min_free_gb (MIN_FREE_GB)")
fi

# Last, and only on a machine that is fit otherwise: the others wait as long for nothing.
has_address() { getent hosts "${host//[\[\]]/}" >/dev/null; }
if [[ -n $host ]] && ((${#problems[@]} == 0)) && ! has_address; then
  echo "octavo: $host, where the machines meet, has no address yet; waiting up to $timeout s" >&2
  end=$((SECONDS + 10#$timeout))
  while ((SECONDS < end)) && ! has_address; do sleep 3; done
fi
if [[ -n $host ]] && ! has_address; then
  problems+=("$host, where the machines meet, has no address")
fi

name=$(hostname)
if ((${#problems[@]})); then
  printf 'octavo: %s is not fit: %s\n' "$name" "${problems[@]}" >&2
  exit 1
fi
echo "octavo: $name is fit: $gpus GPUs, ${free// /} GB free in $folder"
