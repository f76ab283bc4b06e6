#!/usr/bin/env bash
# A run on this host that outlives the connection by which it was started (Linux).
#
#   launch/on_host.sh start --config=FILE --workdir=URL   begin; a run that is left is ended
#   launch/on_host.sh follow [LINES]                      show the log until the run ends
#   launch/on_host.sh result                              running, rc=CODE, rc=CODE by hand, or none
#   launch/on_host.sh stop                                save and stop
#
# Environment: MIXER_RUN, the folder of log, lock and result; default: ~/mixer_run. MIXER_GRACE,
# seconds that a run that is left has to end by itself; default 30. PYTHON; default: .venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/.."
export MIXER_RUN=${MIXER_RUN:-$HOME/mixer_run}
PYTHON=${PYTHON:-.venv/bin/python}

# A lock goes with the process that holds it, also when the host reboots; a number of a process may
# come again.
is_running() {
  [[ -e "$MIXER_RUN/lock" ]] && ! flock --nonblock "$MIXER_RUN/lock" true
}

# Runs in the background, holding the lock.
train() {
  local interrupted="" code=0
  trap 'interrupted=yes' HUP INT TERM # Signals are for the run.
  "$PYTHON" -u -m mixer_jax.main "$@" &
  echo "$PPID" >"$MIXER_RUN/group"
  echo "$!" >"$MIXER_RUN/pid"
  # A signal ends `wait` with a code that is not the run's; then it is asked again.
  while :; do
    interrupted="" code=0
    wait "$!" || code=$?
    [[ -n "$interrupted" ]] || break
  done
  echo "$code" >"$MIXER_RUN/rc.new"
  mv "$MIXER_RUN/rc.new" "$MIXER_RUN/rc"
}

# A run whose other hosts have gone may wait for them for a long time; it is asked, then killed.
end_what_is_left() {
  is_running || return 0
  echo "ending the run that is left here"
  kill -TERM "$(cat "$MIXER_RUN/pid")" 2>/dev/null || true
  flock --timeout "${MIXER_GRACE:-30}" "$MIXER_RUN/lock" true && return
  kill -KILL -- "-$(cat "$MIXER_RUN/group")" 2>/dev/null || true
  flock --timeout 10 "$MIXER_RUN/lock" true
}

start() {
  mkdir -p "$MIXER_RUN"
  end_what_is_left
  rm -f "$MIXER_RUN/rc" "$MIXER_RUN/by_hand" "$MIXER_RUN/pid"
  setsid nohup flock --nonblock --close "$MIXER_RUN/lock" \
    bash launch/on_host.sh train "$@" >"$MIXER_RUN/log" 2>&1 </dev/null &
  for _ in {1..100}; do
    [[ -s "$MIXER_RUN/pid" ]] && return
    sleep 0.1
  done
  echo "error: the run did not begin within 10 s; see $MIXER_RUN/log" >&2
  return 1
}

follow() {
  [[ -e "$MIXER_RUN/log" ]] || return 0
  tail -n "${1:-+1}" --follow --pid="$(cat "$MIXER_RUN/pid")" "$MIXER_RUN/log"
  # Its last lines and its result are written a moment after the run has ended.
  flock --timeout 30 "$MIXER_RUN/lock" true || true
}

result() {
  if is_running; then
    echo running
  elif [[ -s "$MIXER_RUN/rc" ]]; then
    echo "rc=$(cat "$MIXER_RUN/rc")$([[ -e "$MIXER_RUN/by_hand" ]] && echo " by hand")"
  else
    echo none
  fi
}

stop() {
  is_running || return 0
  touch "$MIXER_RUN/by_hand"
  kill -TERM "$(cat "$MIXER_RUN/pid")"
}

case "${1:-}" in
  start | follow | result | stop | train) "$@" ;;
  *)
    echo "error: '${1:-}' is no step; pass start, follow, result or stop" >&2
    exit 2
    ;;
esac
