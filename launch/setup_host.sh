#!/usr/bin/env bash
# Makes a fresh Linux host ready: a Python of 3.11 to 3.13, the packages of requirements.txt, JAX
# for the accelerator that is there; then shows the devices. Run it again and it only checks.
#
#   launch/setup_host.sh [--accelerator=tpu|cuda12|none] [--venv=DIR] [--dry_run]
#
#   --accelerator  default: what is found in /dev
#   --venv         default: .venv in this checkout, where the other scripts look for it
#   --dry_run      print every command, run none
#
# Ubuntu 22.04, which TPU VMs have, comes with Python 3.10. uv takes a newer one if the host has it
# and else brings its own, which needs no root and no package archive of Ubuntu's.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly UV_VERSION=0.13.9 PYTHONS=">=3.11,<3.14"

fail() {
  echo "error: $1" >&2
  exit 2
}

read_arguments() {
  accelerator="" venv=.venv dry_run=""
  local argument
  for argument; do
    case "$argument" in
      --help) sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' && exit ;;
      --accelerator=tpu | --accelerator=cuda12 | --accelerator=none) accelerator=${argument#*=} ;;
      --accelerator=*) fail "--accelerator=${argument#*=} is unknown; choose tpu, cuda12 or none" ;;
      --venv=?*) venv=${argument#*=} ;;
      --dry_run) dry_run=yes ;;
      *) fail "$argument is no option; see --help" ;;
    esac
  done
  accelerator=${accelerator:-$(find_accelerator)}
}

# The files are those of the drivers: /dev/accel of TPU v4 and older, /dev/vfio of newer ones.
find_accelerator() {
  if compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
    echo cuda12
  elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
    echo tpu
  else
    echo none
  fi
}

do_it() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# Sets `uv`: the host's own, or one in a folder beside the environment.
find_uv() {
  if command -v uv >/dev/null; then
    uv=uv
    return
  fi
  uv=$venv-uv/bin/uv
  [[ -x "$uv" ]] && return
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    # Ubuntu keeps what makes environments in a package of its own.
    do_it sudo apt-get update --quiet
    do_it sudo apt-get install --quiet --yes python3-venv
  fi
  do_it python3 -m venv "$venv-uv"
  do_it "$venv-uv/bin/python" -m pip install --quiet "uv==$UV_VERSION"
}

packages() {
  case "$accelerator" in
    none) ;;
    *) echo "jax[$accelerator]" ;;
  esac
}

# What makes another installation necessary.
fingerprint() { echo "$accelerator $(cksum <requirements.txt)"; }

install_packages() {
  if [[ "$(cat "$venv/.installed_by_setup_host" 2>/dev/null)" == "$(fingerprint)" ]]; then
    echo "$venv has everything already"
    return
  fi
  find_uv
  [[ -x "$venv/bin/python" ]] || do_it "$uv" venv --quiet --python "$PYTHONS" "$venv"
  # shellcheck disable=SC2046  # One word, or none.
  do_it "$uv" pip install --quiet --python "$venv/bin/python" --requirement requirements.txt \
    $(packages)
  [[ -n "$dry_run" ]] || fingerprint >"$venv/.installed_by_setup_host"
}

# On one of several TPU hosts JAX would wait for the others, which may not have come so far.
show_devices() {
  case "$accelerator" in
    tpu) do_it "$venv/bin/python" -c 'import glob, jax, libtpu; print(jax.__version__, glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))' ;;
    *) do_it "$venv/bin/python" -c 'import jax; print(jax.__version__, jax.devices())' ;;
  esac
}

read_arguments "$@"
install_packages
show_devices
