#!/usr/bin/env bash
# One training run by several processes on this machine, as if each were a host: for trying and
# debugging what runs on many. Needs bash 3.2 or newer.
#
#   launch/local_multiprocess.sh 2 --config=configs/digits.py
#   launch/local_multiprocess.sh 4 --devices=2 --config=configs/digits.py --config.mesh.fsdp=2
#
#   N               processes
#   --devices=K     simulated CPU devices of each; default 1
#   --grace=SECONDS how long the others have to end by themselves after one has failed; default 60
#   all else        arguments of python -m mixer_jax.main
#
# Ctrl-C and SIGTERM reach all of them: they save and stop. Exits with the code of the first that
# failed. Environment: PYTHON, the Python to use; default: .venv/bin/python if there, else python3.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

# A whole number above zero.
is_count() { [[ "$1" =~ ^[1-9][0-9]*$ ]]; }

read_arguments() {
  case "${1:-}" in
    --help) sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' && exit ;;
    "") fail "the number of processes is missing; pass it first, e.g. 2" ;;
  esac
  is_count "$1" || fail "'$1' is no number of processes; pass 1 or more, first of all"
  count=$1 devices=1 grace=60 arguments=()
  shift
  for argument; do
    case "$argument" in
      --devices=*) devices=${argument#*=} ;;
      --grace=*) grace=${argument#*=} ;;
      *) arguments[${#arguments[@]}]=$argument ;;
    esac
  done
  is_count "$devices" || fail "--devices=$devices is no number of devices; pass 1 or more"
  is_count "$grace" || fail "--grace=$grace is no number of seconds; pass 1 or more"
  [[ ${#arguments[@]} -gt 0 ]] || fail "there is nothing to run; pass e.g. --config=configs/digits.py"
}

find_python() {
  PYTHON=${PYTHON:-python3}
  if [[ "$PYTHON" == python3 && -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no program; run make demo, or set it"
}

# Fails where this Python has not what a run needs, and says so once instead of once a process.
free_port() {
  "$PYTHON" -c 'import importlib.util, socket, sys
importlib.util.find_spec("ml_collections") or sys.exit(1)
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Every process leads a group of what it has started; the group's number is the name of a file.
kill_what_is_left() {
  local file
  for file in "$1"/groups/*; do
    kill -KILL -- "-${file##*/}" 2>/dev/null || true
  done
}

# Runs beside this script and ends when it does, by SIGKILL too: then its end of the pipe is closed.
clean_up_after() {
  trap '' HUP INT TERM
  read -r _ || true
  kill_what_is_left "$1"
  rm -rf "$1"
}

prefix_lines() {
  trap '' HUP INT TERM
  local line
  while IFS= read -r line || [[ -n "$line" ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

start_process() {
  local number=$1
  mkfifo "$folder/output.$number"
  prefix_lines "$number" <"$folder/output.$number" 9>&- &
  readers[number]=$!
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$number \
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices \
    "$PYTHON" -u -m mixer_jax.main "${arguments[@]}" \
    >"$folder/output.$number" 2>&1 </dev/null 9>&- &
  processes[number]=$!
  touch "$folder/groups/$!"
}

signal_all() {
  local process
  # bash 3.2 takes an empty list for an unknown name.
  for process in ${processes[@]+"${processes[@]}"}; do kill "-$1" "$process" 2>/dev/null || true; done
}

# Sets `failed` to the code of the first process that fails. The others should notice by themselves;
# those that have not after the grace period are told so, and killed if that does not help either.
wait_for_all() {
  local number running told=""
  local failed_at=0 last=$((grace < 10 ? grace : 10))
  failed=0
  while :; do
    running=0
    for ((number = 0; number < count; number++)); do
      [[ -n "${processes[number]:-}" ]] || continue
      if kill -0 "${processes[number]}" 2>/dev/null; then
        running=$((running + 1))
        continue
      fi
      local code=0
      wait "${processes[number]}" 2>/dev/null || code=$?
      unset "processes[number]"
      if [[ $code != 0 && $failed == 0 ]]; then
        failed=$code failed_at=$SECONDS
        [[ -n "$asked" ]] || echo "process $number ended with code $code; the others have ${grace} s to end" >&2
      fi
    done
    [[ $running == 0 ]] && return
    if [[ $failed != 0 && $SECONDS -ge $((failed_at + grace)) && -z "$told" ]]; then
      told=yes
      signal_all TERM
    elif [[ -n "$told" && $SECONDS -ge $((failed_at + grace + last)) ]]; then
      signal_all KILL
    fi
    sleep 0.1
  done
}

read_arguments "$@"
cd "$(dirname "$0")/.."
find_python
port=$(free_port) || fail "PYTHON=$PYTHON has not the packages of requirements.txt; run make demo, or set it to a Python that has"
folder=$(mktemp -d)
mkdir "$folder/groups"
mkfifo "$folder/alive"
# Every process in the background gets a group of its own: Ctrl-C comes to this script, which
# passes it on once, and a whole group can be ended.
set -m
clean_up_after "$folder" <"$folder/alive" &
exec 9>"$folder/alive"

processes=() readers=() asked=""
trap 'asked=yes; signal_all INT' INT
trap 'asked=yes; signal_all TERM' TERM HUP
for ((i = 0; i < count; i++)); do start_process "$i"; done
wait_for_all
kill_what_is_left "$folder" # Else what holds the output open is waited for.
for ((i = 0; i < count; i++)); do wait "${readers[i]}" 2>/dev/null || true; done
exit "$failed"
