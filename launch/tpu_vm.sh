#!/usr/bin/env bash
# Trains on Cloud TPU VMs until the run has finished, through preemptions; then deletes the VMs.
#
#   launch/tpu_vm.sh --name=mixer --type=v5litepod-64 --zone=us-west4-a --spot \
#     -- --config=configs/mixer_l16_i21k.py --workdir=gs://BUCKET/run
#   launch/tpu_vm.sh STEP --name=mixer --zone=us-west4-a [...]
#
# Steps; without STEP all of them, in this order:
#   create  request the machines (a queued resource)      run     start the run on every worker
#   wait    wait until they are ready                     logs    follow worker 0 until the run ends
#   setup   copy the code, install Python and packages    delete  delete the machines
# and separately: status; stop (save and stop the run; the machines remain).
#
#   --name=NAME           name of the queued resource and its machines
#   --zone=ZONE           e.g. us-west4-a
#   --type=TYPE           e.g. v4-32, v5litepod-64, v5p-128, v6e-64
#   --slices=N            number of slices of that type (multislice); default: 1; setup, run, logs,
#                         status and stop ask gcloud
#   --spot                cheaper; may be preempted at any time
#   --version=VERSION     TPU software version; default: by --type
#   --project=PROJECT     default: gcloud's
#   --create_flag=FLAG    passed to `queued-resources create`, e.g. --create_flag=--reserved
#   --env KEY=VALUE       environment of the run, e.g. --env TFDS_DATA_DIR=gs://BUCKET/tfds
#   --max_restarts=N      number of times that lost machines are requested again; default: 100
#   --keep                keep the machines at the end
#   --dry_run             print every command, run none
#   -- ...                arguments of python -m mixer_jax.main
#
# Run the same command again to continue: it uses existing machines and follows a run in progress.
# Exits with the run's code (0 finished, 1 failed, 2 usage error, 143 stopped by `stop`), with 2
# after a usage error of its own, and with 130 after Ctrl-C.
# Environment: MIXER_POLL_SECONDS, interval between queries; default: 30.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=tpu_arguments.sh
source "$here/tpu_arguments.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_commands.sh
source "$here/tpu_commands.sh"

# Crashes before a run that lasted STABLE_SECONDS are not counted.
readonly STOPPED=143 MAX_CRASHES=3 STABLE_SECONDS=3600
# Number of queries before machines that do not answer are given up, and of healthy answers before
# machines count as healthy.
readonly MAX_QUERIES=20 HEALTHY_ANSWERS=4

log() { echo "tpu_vm: $*" >&2; }
pause() { [[ -n "$dry_run" ]] || sleep "$poll_seconds"; }

# Sets `state` to the state of the request. Repeats the query while gcloud does not answer, because
# connections recover; but if gcloud has never answered, it is not logged in or lacks permissions.
read_state() {
  local queries=0
  while state=$(request_state "$1") && [[ $state == UNKNOWN ]]; do
    queries=$((queries + 1))
    if [[ -z "$answered" && $queries -ge $MAX_QUERIES ]]; then
      log "giving up after $MAX_QUERIES queries without an answer"
      exit 1
    fi
    pause
  done
  answered=yes
}

# Requests the machines unless they exist; deletes a request whose machines were lost first.
create() {
  local state
  read_state ABSENT
  case "$state" in
    SUSPENDING | SUSPENDED | FAILED | DELETING) delete_machines && create_machines ;;
    ABSENT) create_machines ;;
    *) log "$name already exists ($state)" ;;
  esac
}

# Succeeds when the machines are ready, and fails when they cannot be provided.
wait_for_machines() {
  local state="" previous=""
  while :; do
    read_state ACTIVE
    [[ $state == "$previous" ]] || log "$name is $state"
    previous=$state
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | ABSENT) return 1 ;;
    esac
    pause
  done
}

# Prints whether the machines are healthy, lost, or unknown.
machine_health() {
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

# Succeeds if the machines are lost. Queries several times, because Google may report a preemption
# later than the remaining hosts notice it.
machines_are_lost() {
  local attempt healthy=0
  for ((attempt = 0; attempt < MAX_QUERIES; attempt++)); do
    case "$(machine_health)" in
      lost) return 0 ;;
      healthy) healthy=$((healthy + 1)) ;;
    esac
    [[ $healthy -lt $HEALTHY_ANSWERS ]] || return 1
    pause
  done
  return 0 # Unknown for this long: not usable.
}

# Follows worker 0 until its run has ended. Sets `outcome` to rc=CODE, "rc=CODE (stop requested)",
# lost, or crash.
follow_run() {
  local lines=+1 misses=0
  while :; do
    follow_log "$lines" || true
    lines=5 # After a lost connection, enough to see the progress.
    outcome=$(run_result rc=0)
    case "$outcome" in
      rc=*) return ;;
      running) misses=0 ;;
      none) outcome=crash && return ;;
      *)
        outcome=lost
        case "$(machine_health)" in
          lost) return ;;
          # gcloud answers but the host does not. If neither does, the connection from here is lost.
          healthy) misses=$((misses + 1)) ;;
        esac
        ;;
    esac
    [[ $misses -lt $MAX_QUERIES ]] || return 0
    pause
  done
}

# Sets `outcome` as follow_run does, and `run_seconds`; follows a run that is in progress.
run_once() {
  local start_time
  if [[ $(run_result none) != running ]]; then
    log "setting up $(nodes | wc -w | tr -d ' ') node(s) and starting the run"
    if ! { set_up_machines && start_run; }; then
      outcome=crash
      return
    fi
  fi
  start_time=$(date +%s)
  follow_run
  run_seconds=$(($(date +%s) - start_time))
}

# Sets `action` to what follows from an outcome: finish (sets `code`), lost, restart, or crash.
choose_action() {
  code=1 action=finish
  if [[ $outcome == rc=* ]]; then code=${outcome#rc=} code=${code%% *}; fi
  case "$outcome" in
    "rc=0" | "rc=0 "*) ;; # Also if it finished before it could be stopped.
    *"(stop requested)") keep=yes ;;
    lost) action=lost ;;
    # A lost host ends the run on the other hosts, with 1 or JAX's SIGABRT (134). 1 and 2 may also be
    # errors of the run itself. Codes above 128 are signals that this script did not send; after
    # SIGTERM, for example during host maintenance, the run has saved.
    *)
      if machines_are_lost; then
        action=lost
      elif [[ $code == "$STOPPED" ]]; then
        action=restart
      elif [[ $outcome == crash || $code -gt 128 ]]; then
        action=crash
      fi
      ;;
  esac
}

train_until_finished() {
  local restarts=0 crashes=0
  while :; do
    run_seconds=0
    if ! create; then
      [[ -n "$had_machines" ]] || exit 1 # gcloud has printed why.
      outcome=lost
    elif wait_for_machines; then
      had_machines=yes
      run_once
    elif [[ -z "$had_machines" ]]; then
      log "the machines could not be created: $(request_error)"
      finish 1
    else
      outcome=lost
    fi
    choose_action
    [[ $run_seconds -lt $STABLE_SECONDS ]] || crashes=0
    case "$action" in
      finish) finish "$code" ;;
      restart) log "SIGTERM stopped the run after it had saved; restarting it" ;;
      crash)
        crashes=$((crashes + 1))
        [[ $crashes -le $MAX_CRASHES ]] || finish "$code"
        log "the run crashed ($outcome); restarting it on the same machines"
        ;;
      lost)
        crashes=0 restarts=$((restarts + 1))
        if [[ $restarts -gt $max_restarts ]]; then
          log "the machines were lost more than $max_restarts times"
          finish 1
        fi
        log "the machines were lost; requesting new ones to resume from the newest checkpoint"
        delete_machines || true
        ;;
    esac
    pause
  done
}

# Deletes the machines, unless --keep, and exits with a code.
finish() {
  trap - INT TERM
  if [[ $1 != 0 && -n "$had_machines" ]]; then
    log "the run ended with code $1; last lines of every worker:"
    print_log_tails || true
  fi
  if [[ -n "$keep" ]]; then
    log "the machines are kept and billed; delete them with: $(step_command delete)"
  else
    delete_machines || log "the machines could NOT be deleted; delete them with: $(step_command delete)"
  fi
  exit "$1"
}

interrupt() {
  trap - INT TERM
  local group
  for group in $(jobs -p); do kill -TERM -- "-$group" 2>/dev/null || true; done
  log "interrupted; the run continues and the machines are billed. Run the same command to follow it"
  log "delete the machines with: $(step_command delete)"
  exit "$1"
}

run_step() {
  if [[ $(run_result none) == running ]]; then
    log "$name already has a run in progress; stop it first with: $(step_command stop)"
    exit 1
  fi
  start_run
}

print_status() {
  local node state
  state=$(request_state ACTIVE)
  echo "request  $state"
  case "$state" in UNKNOWN) return 1 ;; ABSENT) return ;; esac
  for node in $(nodes); do echo "$node  $(node_state "$node")"; done
  echo "run      $(run_result none)"
}

parse_arguments "$@"
# Commands of --dry_run are printed to the script's output, also from inside $(...).
exec 3>&1
trap 'interrupt 130' INT
trap 'interrupt 143' TERM
[[ -n "$dry_run" ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed. See https://cloud.google.com/sdk/docs/install"
tmp_dir=$(mktemp -d)
trap 'rm -rf "$tmp_dir"' EXIT
had_machines="" answered=""
case "$step" in
  setup | run | logs | status | stop) [[ -n "$slices" ]] || find_slices ;;
  *) slices=${slices:-1} ;;
esac
case "$step" in
  "") train_until_finished ;;
  create) create ;;
  wait) wait_for_machines ;;
  setup) set_up_machines ;;
  run) run_step ;;
  logs) follow_log +1 ;;
  status) print_status ;;
  stop) stop_run ;;
  delete) delete_machines ;;
esac
