#!/usr/bin/env bash
# Runs one training run as several processes on this machine, as if each were a host: for trying
# and debugging multi-host runs. Needs bash 3.2 or newer.
#
#   launch/local_multiprocess.sh 2 --config=configs/digits.py
#   launch/local_multiprocess.sh 4 --devices=2 --config=configs/digits.py --config.mesh.fsdp=2
#
#   N               number of processes
#   --devices=K     simulated CPU devices per process; default: 1
#   --grace=SECONDS time for the other processes to exit after one has failed; default: 60
#   other arguments are passed to python -m mixer_jax.main
#
# Ctrl-C and SIGTERM are forwarded to all processes, which save and stop. Exits with the code of the
# first process that failed. Environment: PYTHON, the Python interpreter; default: .venv/bin/python
# if it exists, else python3.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

is_positive_integer() { [[ "$1" =~ ^[1-9][0-9]*$ ]]; }

parse_arguments() {
  case "${1:-}" in
    --help) sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' && exit ;;
    "") fail "the number of processes is missing. Pass it first, e.g. 2" ;;
  esac
  is_positive_integer "$1" ||
    fail "the number of processes must be 1 or more, got '$1'. Pass it as the first argument"
  count=$1 devices=1 grace=60 arguments=()
  shift
  for argument; do
    case "$argument" in
      --devices=*) devices=${argument#*=} ;;
      --grace=*) grace=${argument#*=} ;;
      *) arguments[${#arguments[@]}]=$argument ;;
    esac
  done
  is_positive_integer "$devices" || fail "--devices must be 1 or more, got '$devices'"
  is_positive_integer "$grace" || fail "--grace must be 1 second or more, got '$grace'"
  [[ ${#arguments[@]} -gt 0 ]] ||
    fail "the arguments of the run are missing. Pass e.g. --config=configs/digits.py"
}

find_python() {
  PYTHON=${PYTHON:-python3}
  if [[ "$PYTHON" == python3 && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
  command -v "$PYTHON" >/dev/null ||
    fail "PYTHON must be a Python interpreter, got $PYTHON. Run make demo, or set PYTHON"
}

# Also fails if this Python lacks the packages, so that the error is printed once, not per process.
find_free_port() {
  "$PYTHON" -c 'import importlib.util, socket, sys
importlib.util.find_spec("ml_collections") or sys.exit(1)
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Each process has its own process group, which includes its children; files are named by group.
kill_process_groups() {
  local file
  for file in "$1"/groups/*; do
    kill -KILL -- "-${file##*/}" 2>/dev/null || true
  done
}

# Runs in the background and cleans up when this script ends, even by SIGKILL, which closes the
# script's end of the pipe.
clean_up_at_exit() {
  trap '' HUP INT TERM
  read -r _ || true
  kill_process_groups "$1"
  rm -rf "$1"
}

prefix_lines() {
  trap '' HUP INT TERM
  local line
  while IFS= read -r line || [[ -n "$line" ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

start_process() {
  local index=$1
  mkfifo "$folder/output.$index"
  prefix_lines "$index" <"$folder/output.$index" 9>&- &
  readers[index]=$!
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$index \
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices \
    "$PYTHON" -u -m mixer_jax.main "${arguments[@]}" \
    >"$folder/output.$index" 2>&1 </dev/null 9>&- &
  processes[index]=$!
  touch "$folder/groups/$!"
}

signal_all() {
  local process
  # In bash 3.2, an empty array counts as unset.
  for process in ${processes[@]+"${processes[@]}"}; do kill "-$1" "$process" 2>/dev/null || true; done
}

# Sets `exit_code` to the code of the first process that fails. JAX ends the others; those still
# running after the grace period get SIGTERM, and SIGKILL if that does not help.
wait_for_all() {
  local index running terminated=""
  local failed_at=0 kill_delay=$((grace < 10 ? grace : 10))
  exit_code=0
  while :; do
    running=0
    for ((index = 0; index < count; index++)); do
      [[ -n "${processes[index]:-}" ]] || continue
      if kill -0 "${processes[index]}" 2>/dev/null; then
        running=$((running + 1))
        continue
      fi
      local code=0
      wait "${processes[index]}" 2>/dev/null || code=$?
      unset "processes[index]"
      if [[ $code != 0 && $exit_code == 0 ]]; then
        exit_code=$code failed_at=$SECONDS
        [[ -n "$stop_requested" ]] ||
          echo "process $index exited with code $code; the others have ${grace} s to exit" >&2
      fi
    done
    [[ $running == 0 ]] && return
    if [[ $exit_code != 0 && $SECONDS -ge $((failed_at + grace)) && -z "$terminated" ]]; then
      terminated=yes
      signal_all TERM
    elif [[ -n "$terminated" && $SECONDS -ge $((failed_at + grace + kill_delay)) ]]; then
      signal_all KILL
    fi
    sleep 0.1
  done
}

parse_arguments "$@"
cd "$(dirname "$0")/.."
find_python
port=$(find_free_port) ||
  fail "PYTHON=$PYTHON must have the packages of requirements.txt. Run make demo, or set PYTHON"
folder=$(mktemp -d)
mkdir "$folder/groups"
mkfifo "$folder/alive"
# Every background process gets its own process group: Ctrl-C reaches only this script, which
# forwards it once, and a group can be killed as a whole.
set -m
clean_up_at_exit "$folder" <"$folder/alive" &
exec 9>"$folder/alive"

processes=() readers=() stop_requested=""
trap 'stop_requested=yes; signal_all INT' INT
trap 'stop_requested=yes; signal_all TERM' TERM HUP
for ((i = 0; i < count; i++)); do start_process "$i"; done
wait_for_all
kill_process_groups "$folder" # Remaining children would keep the output open.
for ((i = 0; i < count; i++)); do wait "${readers[i]}" 2>/dev/null || true; done
exit "$exit_code"
