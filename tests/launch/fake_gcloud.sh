#!/usr/bin/env bash
# Plays Google's cloud for the tests of tpu_vm.sh, in the folder $CLOUD:
#   calls     the commands it was given, a line each
#   request   the state of the queued resource; no file: there is none
#   node      the state of its machines
#   created   what a new request becomes; default: ACTIVE
#   run       what has become of the run, a line for every time that it is asked; "preempt" before
#             an answer takes the machines away, and "later" does so when they are next looked at
#   fails     what ends a command with an error that has this in it, once; fails_later: a command
#             after the machines were taken away
#   denied    what it says instead of answering anything
#   slices    how many nodes the request is for; no file: one
#   clock     the time, if it is played too; every run that is followed lasts an hour and a half
set -euo pipefail
cd "$CLOUD"
printf '%s\n' "$*" >>calls

take_away() {
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
  echo "it does not work" >&2
  exit 1
fi
case "$*" in
  *"tpu-vm describe"* | *"queued-resources describe"*"(state.state)"*)
    if [[ -e later && "$*" == *tpu-vm* ]]; then
      rm later
      take_away
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
      preempt*) take_away ;;
      later*) touch later ;;
    esac
    answer=${answer#preempt} answer=${answer#later}
    [[ -n "$answer" ]] || exit 255
    echo "Welcome to this machine"
    echo "${answer# }"
    ;;
esac
