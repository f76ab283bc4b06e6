#!/usr/bin/env bash
# Runs training on this host, detached from the connection that starts it (Linux).
#
#   launch/on_host.sh start --config=FILE --workdir=URL   start; a run that is still there is ended
#   launch/on_host.sh follow [LINES]                      print the log until the run ends
#   launch/on_host.sh result                              running, none, rc=CODE, or
#                                                         rc=CODE (stop requested)
#   launch/on_host.sh stop                                save and stop
#
# Environment: MIXER_RUN, the folder for log, lock and result; default: ~/mixer_run. MIXER_GRACE,
# seconds that an old run has to end by itself; default: 30. PYTHON; default: .venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/.."
export MIXER_RUN=${MIXER_RUN:-$HOME/mixer_run}
PYTHON=${PYTHON:-.venv/bin/python}

# A lock is released when its process ends, also at a reboot; a process id may be reused.
is_running() {
  [[ -e "$MIXER_RUN/lock" ]] && ! flock --nonblock "$MIXER_RUN/lock" true
}

# Runs in the background, holding the lock.
train() {
  local interrupted="" code=0
  trap 'interrupted=yes' HUP INT TERM # Signals are meant for the training process.
  "$PYTHON" -u -m mixer_jax.main "$@" &
  echo "$PPID" >"$MIXER_RUN/group"
  echo "$!" >"$MIXER_RUN/pid"
  # A signal interrupts `wait` with a code that is not the run's, so wait again.
  while :; do
    interrupted="" code=0
    wait "$!" || code=$?
    [[ -n "$interrupted" ]] || break
  done
  echo "$code" >"$MIXER_RUN/rc.new"
  mv "$MIXER_RUN/rc.new" "$MIXER_RUN/rc"
}

# A run that has lost its other hosts may still be waiting for them.
end_old_run() {
  is_running || return 0
  echo "ending the run that is still on this host"
  kill -TERM "$(cat "$MIXER_RUN/pid")" 2>/dev/null || true
  flock --timeout "${MIXER_GRACE:-30}" "$MIXER_RUN/lock" true && return
  kill -KILL -- "-$(cat "$MIXER_RUN/group")" 2>/dev/null || true
  flock --timeout 10 "$MIXER_RUN/lock" true
}

start() {
  mkdir -p "$MIXER_RUN"
  end_old_run
  rm -f "$MIXER_RUN/rc" "$MIXER_RUN/stop_requested" "$MIXER_RUN/pid"
  setsid nohup flock --nonblock --close "$MIXER_RUN/lock" \
    bash launch/on_host.sh train "$@" >"$MIXER_RUN/log" 2>&1 </dev/null &
  for _ in {1..100}; do
    [[ -s "$MIXER_RUN/pid" ]] && return
    sleep 0.1
  done
  echo "error: the run did not start within 10 s; see $MIXER_RUN/log" >&2
  return 1
}

follow() {
  [[ -e "$MIXER_RUN/log" ]] || return 0
  tail -n "${1:-+1}" --follow --pid="$(cat "$MIXER_RUN/pid")" "$MIXER_RUN/log"
  # The last lines and the result are written a moment after the process has ended.
  flock --timeout 30 "$MIXER_RUN/lock" true || true
}

result() {
  if is_running; then
    echo running
  elif [[ -s "$MIXER_RUN/rc" ]]; then
    echo "rc=$(cat "$MIXER_RUN/rc")$([[ -e "$MIXER_RUN/stop_requested" ]] && echo " (stop requested)")"
  else
    echo none
  fi
}

stop() {
  is_running || return 0
  touch "$MIXER_RUN/stop_requested"
  kill -TERM "$(cat "$MIXER_RUN/pid")"
}

case "${1:-}" in
  start | follow | result | stop | train) "$@" ;;
  *)
    echo "error: the step must be start, follow, result or stop, got '${1:-}'" >&2
    exit 2
    ;;
esac
