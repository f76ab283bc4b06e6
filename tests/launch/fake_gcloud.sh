#!/usr/bin/env bash
# Fake gcloud for the tests of tpu_vm.sh. Files in $CLOUD control it:
#   calls     log of the commands, one per line
#   request   state of the queued resource; absent: it does not exist
#   node      state of its machines
#   created   state after `create`; default: ACTIVE
#   run       results of the run, one line per query; a line that starts with "preempt" preempts
#             the machines before the answer, "later" when their state is queried next
#   fails     the next command that contains this text fails
#   fails_later  the same, after a preemption
#   denied    error message of every command
#   slices    number of nodes of the request; absent: one
#   clock     fake time; following a run advances it by an hour and a half
#   endless   if it exists, following a run takes a minute
set -euo pipefail
cd "$CLOUD"
printf '%s\n' "$*" >>calls

preempt() {
  echo SUSPENDED >request
  echo PREEMPTED >node
  if [[ -e fails_later ]]; then mv fails_later fails; fi
}

if [[ -e denied ]]; then
  cat denied >&2
  exit 1
fi
if [[ -e fails && "$*" == *"$(cat fails)"* ]]; then
  rm fails
  echo "fake failure" >&2
  exit 1
fi
case "$*" in
  *"tpu-vm describe"* | *"queued-resources describe"*"(state.state)"*)
    if [[ -e later && "$*" == *tpu-vm* ]]; then
      rm later
      preempt
    fi
    ;;
esac
case "$*" in
  *"queued-resources create"*)
    [[ ! -e request ]] || { echo "ALREADY_EXISTS" >&2 && exit 1; }
    cat created >request 2>/dev/null || echo ACTIVE >request
    echo READY >node
    ;;
  *"queued-resources delete"*) rm request || { echo "NOT_FOUND: it" >&2 && exit 1; } ;;
  *"nodeCount"*) cat slices 2>/dev/null || echo ;;
  *"error.message"*) echo "no quota" ;;
  *"queued-resources describe"*) cat request 2>/dev/null || { echo "NOT_FOUND: it" >&2 && exit 1; } ;;
  *"tpu-vm describe"*) cat node ;;
  *"on_host.sh follow"*)
    echo "step 1/2  loss 2.3"
    if [[ -e clock ]]; then echo $(($(cat clock) + 5400)) >clock; fi
    if [[ -e endless ]]; then exec sleep 60; fi
    ;;
  *"on_host.sh result"*)
    answer=$(head -n 1 run)
    sed -i 1d run
    case "$answer" in
      preempt*) preempt ;;
      later*) touch later ;;
    esac
    answer=${answer#preempt} answer=${answer#later}
    [[ -n "$answer" ]] || exit 255
    echo "Welcome to this machine"
    echo "${answer# }"
    ;;
esac
