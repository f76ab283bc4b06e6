#!/usr/bin/env bash
# Trains on Cloud TPU VMs, through preemptions, to the end; then deletes them.
#
#   launch/tpu_vm.sh --name=mixer --type=v5litepod-64 --zone=us-west4-a --spot \
#     -- --config=configs/mixer_l16_i21k.py --workdir=gs://BUCKET/run
#   launch/tpu_vm.sh STEP --name=mixer --zone=us-west4-a [...]
#
# Steps, all of them in this order if none is named:
#   create  ask for the machines (a queued resource)      run     begin the run on every worker
#   wait    until they are there                          logs    show worker 0 until the run ends
#   setup   copy the code, install Python and packages    delete  the machines
# and beside them: status; stop (save and stop the run; the machines stay).
#
#   --name=NAME           of the queued resource and its machines
#   --zone=ZONE           e.g. us-west4-a
#   --type=TYPE           e.g. v4-32, v5litepod-64, v5p-128, v6e-64
#   --slices=N            so many of that type joined over the network (multislice); setup, run,
#                         logs, status and stop ask the cloud for the number if it is not given
#   --spot                cheaper; may be taken away at any time
#   --version=VERSION     of the TPU software; default: the one for --type
#   --project=PROJECT     default: gcloud's
#   --create_flag=FLAG    passed to `queued-resources create`, e.g. --create_flag=--reserved
#   --env KEY=VALUE       environment of the run, e.g. --env TFDS_DATA_DIR=gs://BUCKET/tfds
#   --max_restarts=N      how often the machines are asked for again; default 100
#   --keep                do not delete the machines at the end
#   --dry_run             print every command, run none
#   -- ...                arguments of python -m mixer_jax.main
#
# Start the same command again and it goes on where it was: machines that are there are used, a run
# that is going on is followed. Exits with the run's code (0 finished, 1 failed, 2 wrongly asked
# for, 143 stopped by `stop`), with 2 for a mistake in the arguments, 130 after Ctrl-C.
# Environment: MIXER_POLL_SECONDS, between two questions to the cloud; default 30.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=tpu_arguments.sh
source "$here/tpu_arguments.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_commands.sh
source "$here/tpu_commands.sh"

# A run that lasted LONG seconds was well: crashes before it do not count.
readonly STOPPED=143 MAX_CRASHES=3 LONG=3600
# Questions to the cloud: until machines that do not answer are given up; until healthy ones are
# believed to be so.
readonly PATIENCE=20 LOOKS=4

say() { echo "tpu_vm: $*" >&2; }
pause() { [[ -n "$dry_run" ]] || sleep "$poll_seconds"; }

# Sets `state` to the request's. If the cloud does not answer it is asked again: a connection comes
# back. What has never answered is not logged in, or not allowed.
ask_for_state() {
  local questions=0
  while state=$(request_state "$1") && [[ $state == UNKNOWN ]]; do
    questions=$((questions + 1))
    if [[ -z "$answered" && $questions -ge $PATIENCE ]]; then
      say "given up after $PATIENCE questions without an answer"
      exit 1
    fi
    pause
  done
  answered=yes
}

# Asks for the machines unless they are there; what was taken away is cleared first.
create() {
  local state
  ask_for_state ABSENT
  case "$state" in
    SUSPENDING | SUSPENDED | FAILED | DELETING) delete_machines && create_machines ;;
    ABSENT) create_machines ;;
    *) say "$name is there already ($state)" ;;
  esac
}

# Succeeds when the machines can be used, fails when they will not come.
wait_for_machines() {
  local state="" before=""
  while :; do
    ask_for_state ACTIVE
    [[ $state == "$before" ]] || say "$name is $state"
    before=$state
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | ABSENT) return 1 ;;
    esac
    pause
  done
}

# Says whether the machines are healthy, lost, or neither for now.
health() {
  local node state
  state=$(request_state ACTIVE)
  case "$state" in
    ACTIVE) ;;
    UNKNOWN) echo unknown && return ;;
    *) echo lost && return ;;
  esac
  for node in $(nodes); do
    state=$(node_state "$node")
    case "$state" in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | ABSENT) echo lost && return ;;
      *) echo unknown && return ;;
    esac
  done
  echo healthy
}

# Says whether the machines are lost, some time after a run has ended on them: a preemption may be
# told later than the hosts that remain notice it.
are_lost() {
  local look healthy=0
  for ((look = 0; look < PATIENCE; look++)); do
    case "$(health)" in
      lost) return 0 ;;
      healthy) healthy=$((healthy + 1)) ;;
    esac
    [[ $healthy -lt $LOOKS ]] || return 1
    pause
  done
  return 0 # Neither: whatever they are, nobody can train on them.
}

# Shows worker 0 until its run has ended. Sets `outcome`: rc=CODE, "rc=CODE by hand", lost, or crash.
follow_run() {
  local from=+1 misses=0
  while :; do
    follow_log "$from" || true
    from=5 # After a lost connection: enough to see where it was.
    outcome=$(run_result rc=0)
    case "$outcome" in
      rc=*) return ;;
      running) misses=0 ;;
      none) outcome=crash && return ;;
      *)
        outcome=lost
        case "$(health)" in
          lost) return ;;
          # The cloud answers, and the host does not. Where neither does, it is our connection.
          healthy) misses=$((misses + 1)) ;;
        esac
        ;;
    esac
    [[ $misses -lt $PATIENCE ]] || return 0
    pause
  done
}

# Sets `outcome` as follow_run does, and `lasted`, in seconds; goes on with a run that is there.
run_once() {
  local begun
  if [[ $(run_result none) != running ]]; then
    say "setting up $(nodes | wc -w | tr -d ' ') node(s) and beginning the run"
    if ! { set_up_machines && start_run; }; then
      outcome=crash
      return
    fi
  fi
  begun=$(date +%s)
  follow_run
  lasted=$(($(date +%s) - begun))
}

# What an outcome means: finish (sets `code`), lost, again, or crash, in `verdict`.
judge() {
  code=1 verdict=finish
  if [[ $outcome == rc=* ]]; then code=${outcome#rc=} code=${code%% *}; fi
  case "$outcome" in
    "rc=0" | "rc=0 "*) ;; # A run that has finished before it was stopped has finished.
    *" by hand") keep=yes ;;
    lost) verdict=lost ;;
    # A host that was lost ends the run on the others, as an error of its own does.
    *)
      # 1 and 2 are the run's own, or tell of a host that is gone or did not come. Above 128 is a
      # signal that nobody here has sent; SIGTERM, of a host in maintenance say, has saved the run.
      if are_lost; then
        verdict=lost
      elif [[ $code == "$STOPPED" ]]; then
        verdict=again
      elif [[ $outcome == crash || $code -gt 128 ]]; then
        verdict=crash
      fi
      ;;
  esac
}

train_to_the_end() {
  local restarts=0 crashes=0
  while :; do
    lasted=0
    if ! create; then
      [[ -n "$were_there" ]] || exit 1 # gcloud has said why.
      outcome=lost
    elif wait_for_machines; then
      were_there=yes
      run_once
    elif [[ -z "$were_there" ]]; then
      say "the machines did not come: $(request_problem)"
      finish 1
    else
      outcome=lost
    fi
    judge
    [[ $lasted -lt $LONG ]] || crashes=0
    case "$verdict" in
      finish) finish "$code" ;;
      again) say "the run was stopped by SIGTERM, and has saved; beginning it again" ;;
      crash)
        crashes=$((crashes + 1))
        [[ $crashes -le $MAX_CRASHES ]] || finish "$code"
        say "the run broke off ($outcome); beginning it again on the same machines"
        ;;
      lost)
        crashes=0 restarts=$((restarts + 1))
        if [[ $restarts -gt $max_restarts ]]; then
          say "the machines were lost more than $max_restarts times"
          finish 1
        fi
        say "the machines were lost; asking for new ones: the run goes on from its newest checkpoint"
        delete_machines || true
        ;;
    esac
    pause
  done
}

# Ends this script with a code, and the machines with it.
finish() {
  trap - INT TERM
  if [[ $1 != 0 && -n "$were_there" ]]; then
    say "the run ended with code $1; the last lines of every worker:"
    show_tails || true
  fi
  if [[ -n "$keep" ]]; then
    say "the machines are kept, and cost; to delete them: $(hint delete)"
  else
    delete_machines || say "the machines could NOT be deleted; do it by: $(hint delete)"
  fi
  exit "$1"
}

interrupted() {
  trap - INT TERM
  local group
  for group in $(jobs -p); do kill -TERM -- "-$group" 2>/dev/null || true; done
  say "interrupted; machines and run go on, and cost. The same command follows them again."
  say "To delete them: $(hint delete)"
  exit "$1"
}

begin_run() {
  if [[ $(run_result none) == running ]]; then
    say "a run is going on on $name already; to end it first: $(hint stop)"
    exit 1
  fi
  start_run
}

status() {
  local node state
  state=$(request_state ACTIVE)
  echo "request  $state"
  case "$state" in UNKNOWN) return 1 ;; ABSENT) return ;; esac
  for node in $(nodes); do echo "$node  $(node_state "$node")"; done
  echo "run      $(run_result none)"
}

read_arguments "$@"
# Commands are shown where the script's output goes, also from inside $(...).
exec 3>&1
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
[[ -n "$dry_run" ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
were_there="" answered=""
case "$step" in
  setup | run | logs | status | stop) [[ -n "$slices" ]] || find_slices ;;
  *) slices=${slices:-1} ;;
esac
case "$step" in
  "") train_to_the_end ;;
  create) create ;;
  wait) wait_for_machines ;;
  setup) set_up_machines ;;
  run) begin_run ;;
  logs) follow_log +1 ;;
  status) status ;;
  stop) stop_run ;;
  delete) delete_machines ;;
esac
