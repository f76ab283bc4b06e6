# The gcloud commands of tpu_vm.sh, one function per command. Sourced.
# shellcheck shell=bash disable=SC2154  # tpu_vm.sh and tpu_arguments.sh set these names.

readonly REMOTE=mixer_jax
# Parts of this checkout that hosts need.
readonly CODE="mixer_jax configs launch requirements.txt requirements-gcs.txt requirements-tpu.txt"

# Prints its arguments, quoted so that a shell parses them into the same arguments.
quote() {
  local word line=""
  for word; do
    if [[ -z "$word" || "$word" == *[!A-Za-z0-9_./:=,@%+-]* ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry_run prints it instead.
execute() {
  if [[ -n "$dry_run" ]]; then
    quote "$@" >&3
  else
    "$@"
  fi
}

# Logs once that WHO does not answer, and why: log_failure WHO FILE_WITH_ERRORS. Queries run in
# subshells, $(...), so what has been logged is remembered in a file.
log_failure() {
  local reason
  # Skips what precedes an error of gcloud or ssh.
  reason=$(sed -n -e '/^ERROR/,$p' -e '/^ssh: /,/^ERROR/p' "$2")
  reason=$(tr -s '[:space:]' ' ' <<<"${reason:-$(<"$2")}")
  reason=${reason:0:300} reason="$1 does not answer: ${reason% }"
  grep -q -x -F -e "$reason" "$tmp_dir/logged" 2>/dev/null && return
  echo "$reason" >>"$tmp_dir/logged"
  log "$reason"
}

# Prints the last line that a gcloud command prints, ABSENT if the resource does not exist, or
# UNKNOWN and logs why if gcloud does not answer. With --dry_run prints the command to the script's
# output, and its first argument as the answer.
query() {
  local assumed=$1 answer errors=$tmp_dir/errors who=gcloud
  shift
  if [[ -n "$dry_run" ]]; then
    quote "$@" >&3
    echo "$assumed"
    return
  fi
  if answer=$("$@" 2>"$errors"); then
    # A host may print a greeting first.
    echo "${answer##*$'\n'}"
  elif grep -q -e NOT_FOUND -e "not found" "$errors"; then
    echo ABSENT
  else
    [[ "$*" != *" ssh "* ]] || who="the host"
    log_failure "$who" "$errors"
    echo UNKNOWN
  fi
}

location() { echo "--zone=$zone${project:+ --project=$project}"; }

nodes() {
  local index
  if [[ $slices == 1 ]]; then
    echo "$name"
    return
  fi
  for ((index = 0; index < slices; index++)); do echo "$name-$index"; done
}

first_node() { if [[ $slices == 1 ]]; then echo "$name"; else echo "$name-0"; fi; }

create_machines() {
  local count=(--node-id="$name")
  [[ $slices == 1 ]] || count=(--node-count="$slices" --node-prefix="$name")
  # shellcheck disable=SC2046  # The location is words without spaces.
  execute gcloud compute tpus queued-resources create "$name" $(location) --quiet "${count[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
}

request_state() {
  # shellcheck disable=SC2046
  query "$1" gcloud compute tpus queued-resources describe "$name" $(location) \
    "--format=value(state.state)"
}

# Prints the number of slices of the request; nothing if it is one.
request_slices() {
  # shellcheck disable=SC2046
  query "" gcloud compute tpus queued-resources describe "$name" $(location) \
    "--format=value(tpu.nodeSpec[0].multisliceParams.nodeCount)"
}

# Sets `slices` to the number of slices of the request.
find_slices() {
  local answer
  answer=$(request_slices)
  case "$answer" in
    UNKNOWN) exit 1 ;;
    [1-9]*) slices=$answer ;;
    *) slices=1 ;;
  esac
}

request_error() {
  # shellcheck disable=SC2046
  query "" gcloud compute tpus queued-resources describe "$name" $(location) \
    "--format=value(state.failedData.error.message)"
}

node_state() {
  # shellcheck disable=SC2046
  query READY gcloud compute tpus tpu-vm describe "$1" $(location) "--format=value(state)"
}

# Runs a command line on workers of a node: ssh_node NODE WORKERS COMMAND
ssh_node() {
  # shellcheck disable=SC2046
  execute gcloud compute tpus tpu-vm ssh "$1" $(location) --quiet --worker="$2" --command="$3"
}

# Starts a command in the background, in its own process group, which `interrupt` can end.
run_in_background() {
  set -m
  "$@" </dev/null &
  set +m
}

# Calls a function for all nodes concurrently, and fails if one of the calls fails.
for_each_node() {
  local node process processes=() status=0
  for node in $(nodes); do
    if [[ -n "$dry_run" ]]; then
      "$@" "$node"
      continue
    fi
    run_in_background "$@" "$node"
    processes[${#processes[@]}]=$!
  done
  for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || status=1; done
  return "$status"
}

pack_code() {
  # shellcheck disable=SC2086  # Names without spaces.
  execute tar -czf "$1" --exclude=__pycache__ -C "$here/.." $CODE
}

set_up_node() {
  # shellcheck disable=SC2046
  execute gcloud compute tpus tpu-vm scp "$1" "$2:$REMOTE.tgz" $(location) --quiet --worker=all &&
    ssh_node "$2" all "mkdir -p $REMOTE && tar -xzf $REMOTE.tgz -C $REMOTE && bash $REMOTE/launch/setup_host.sh --accelerator=tpu"
}

set_up_machines() {
  local archive=${TMPDIR:-/tmp}/$name-$REMOTE.tgz code=0
  pack_code "$archive" && for_each_node set_up_node "$archive" || code=1
  execute rm -f "$archive"
  return "$code"
}

start_node() {
  ssh_node "$1" all "$(quote ${environment[@]+env "${environment[@]}"} \
    bash "$REMOTE/launch/on_host.sh" start ${arguments[@]+"${arguments[@]}"})"
}

start_run() { for_each_node start_node; }

stop_node() { ssh_node "$1" all "bash $REMOTE/launch/on_host.sh stop"; }

stop_run() { for_each_node stop_node; }

# In the background, because bash handles a signal only after a foreground command has ended.
follow_log() {
  run_in_background ssh_node "$(first_node)" 0 "bash $REMOTE/launch/on_host.sh follow $1"
  wait "$!"
}

# Prints the result of the run on worker 0: running, rc=CODE, none, or UNKNOWN.
run_result() {
  # shellcheck disable=SC2046
  query "$1" gcloud compute tpus tpu-vm ssh "$(first_node)" $(location) --quiet --worker=0 \
    --command="if [ -e $REMOTE/launch/on_host.sh ]; then bash $REMOTE/launch/on_host.sh result; else echo none; fi"
}

print_log_tail() { ssh_node "$1" all "tail -n 20 mixer_run/log"; }

print_log_tails() { for_each_node print_log_tail; }

# Without --quiet, gcloud would ask for confirmation; without --force, it refuses to delete a
# request that has machines.
delete_machines() {
  # shellcheck disable=SC2046
  execute gcloud compute tpus queued-resources delete "$name" $(location) --force --quiet
}

# Prints the command line of a step for these machines.
step_command() {
  local multislice=""
  [[ ${slices:-1} == 1 ]] || multislice=yes
  quote launch/tpu_vm.sh "$1" --name="$name" --zone="$zone" ${project:+--project="$project"} \
    ${multislice:+--slices="$slices"}
}
