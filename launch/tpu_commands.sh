# What tpu_vm.sh asks of gcloud, one function a command. Sourced.
# shellcheck shell=bash disable=SC2154  # The names read here are set there.

readonly REMOTE=mixer_jax
# What the hosts need of this checkout.
readonly CODE="mixer_jax configs launch requirements.txt"

# Writes its arguments as a line that a shell would read as the same arguments.
quoted() {
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
do_it() {
  if [[ -n "$dry_run" ]]; then
    quoted "$@" >&3
  else
    "$@"
  fi
}

# Says once that WHO does not answer, and why: say_why WHO FILE, of what gcloud wrote. Questions are
# asked in $(...), which can remember by a file alone.
say_why() {
  local why
  # What comes before a line that gcloud or ssh marks is chatter.
  why=$(sed -n -e '/^ERROR/,$p' -e '/^ssh: /,/^ERROR/p' "$2")
  why=$(tr -s '[:space:]' ' ' <<<"${why:-$(<"$2")}")
  why=${why:0:300} why="$1 does not answer: ${why% }"
  grep -q -x -F -e "$why" "$notes/said" 2>/dev/null && return
  echo "$why" >>"$notes/said"
  say "$why"
}

# Prints what a gcloud command answers: ABSENT if there is no such thing, UNKNOWN if it does not
# answer; then says why. With --dry_run prints the command, and answers with the first argument.
ask() {
  local assumed=$1 answer problems=$notes/problems who=gcloud
  shift
  if [[ -n "$dry_run" ]]; then
    quoted "$@" >&3
    echo "$assumed"
    return
  fi
  if answer=$("$@" 2>"$problems"); then
    # What a host greets with comes first.
    echo "${answer##*$'\n'}"
  elif grep -q -e NOT_FOUND -e "not found" "$problems"; then
    echo ABSENT
  else
    [[ "$*" != *" ssh "* ]] || who="the host"
    say_why "$who" "$problems"
    echo UNKNOWN
  fi
}

place() { echo "--zone=$zone${project:+ --project=$project}"; }

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
  # shellcheck disable=SC2046  # The place is words without spaces.
  do_it gcloud compute tpus queued-resources create "$name" $(place) --quiet "${count[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
}

request_state() {
  # shellcheck disable=SC2046
  ask "$1" gcloud compute tpus queued-resources describe "$name" $(place) \
    "--format=value(state.state)"
}

# How many nodes the request is for, if more than one.
request_slices() {
  # shellcheck disable=SC2046
  ask "" gcloud compute tpus queued-resources describe "$name" $(place) \
    "--format=value(tpu.nodeSpec[0].multisliceParams.nodeCount)"
}

# Sets `slices` to what was asked for, where the number was not given.
find_slices() {
  local answer
  answer=$(request_slices)
  case "$answer" in
    UNKNOWN) exit 1 ;;
    [1-9]*) slices=$answer ;;
    *) slices=1 ;;
  esac
}

request_problem() {
  # shellcheck disable=SC2046
  ask "" gcloud compute tpus queued-resources describe "$name" $(place) \
    "--format=value(state.failedData.error.message)"
}

node_state() {
  # shellcheck disable=SC2046
  ask READY gcloud compute tpus tpu-vm describe "$1" $(place) "--format=value(state)"
}

# Runs a command line on workers of a node: on_node NODE WORKERS COMMAND
on_node() {
  # shellcheck disable=SC2046
  do_it gcloud compute tpus tpu-vm ssh "$1" $(place) --quiet --worker="$2" --command="$3"
}

# Starts a command in the background, in a group of its own that `interrupted` can end as a whole.
in_background() {
  set -m
  "$@" </dev/null &
  set +m
}

# Calls a function for every node, at once, and fails if one of them fails.
for_each_node() {
  local node process processes=() bad=0
  for node in $(nodes); do
    if [[ -n "$dry_run" ]]; then
      "$@" "$node"
      continue
    fi
    in_background "$@" "$node"
    processes[${#processes[@]}]=$!
  done
  for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || bad=1; done
  return "$bad"
}

pack_code() {
  # shellcheck disable=SC2086  # Names without spaces.
  do_it tar -czf "$1" --exclude=__pycache__ -C "$here/.." $CODE
}

set_up_node() {
  # shellcheck disable=SC2046
  do_it gcloud compute tpus tpu-vm scp "$1" "$2:$REMOTE.tgz" $(place) --quiet --worker=all &&
    on_node "$2" all "mkdir -p $REMOTE && tar -xzf $REMOTE.tgz -C $REMOTE && bash $REMOTE/launch/setup_host.sh --accelerator=tpu"
}

set_up_machines() {
  local archive=${TMPDIR:-/tmp}/$name-$REMOTE.tgz code=0
  pack_code "$archive" && for_each_node set_up_node "$archive" || code=1
  do_it rm -f "$archive"
  return "$code"
}

start_node() {
  on_node "$1" all "$(quoted ${environment[@]+env "${environment[@]}"} \
    bash "$REMOTE/launch/on_host.sh" start ${arguments[@]+"${arguments[@]}"})"
}

start_run() { for_each_node start_node; }

stop_node() { on_node "$1" all "bash $REMOTE/launch/on_host.sh stop"; }

stop_run() { for_each_node stop_node; }

# In the background, so that a signal to this script is not kept waiting for hours.
follow_log() {
  in_background on_node "$(first_node)" 0 "bash $REMOTE/launch/on_host.sh follow $1"
  wait "$!"
}

# Says what has become of the run on worker 0: running, rc=CODE, none, or UNKNOWN.
run_result() {
  # shellcheck disable=SC2046
  ask "$1" gcloud compute tpus tpu-vm ssh "$(first_node)" $(place) --quiet --worker=0 \
    --command="if [ -e $REMOTE/launch/on_host.sh ]; then bash $REMOTE/launch/on_host.sh result; else echo none; fi"
}

show_tails_of_node() { on_node "$1" all "tail -n 20 mixer_run/log"; }

show_tails() { for_each_node show_tails_of_node; }

# Without --quiet gcloud would ask; without --force it would refuse while there are machines.
delete_machines() {
  # shellcheck disable=SC2046
  do_it gcloud compute tpus queued-resources delete "$name" $(place) --force --quiet
}

# Prints the command of a step, for these machines.
hint() {
  local several=""
  [[ ${slices:-1} == 1 ]] || several=yes
  quoted launch/tpu_vm.sh "$1" --name="$name" --zone="$zone" ${project:+--project="$project"} \
    ${several:+--slices="$slices"}
}
