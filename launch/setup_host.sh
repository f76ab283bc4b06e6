#!/usr/bin/env bash
# Sets up a fresh Linux host: Python 3.11 to 3.13, the packages of requirements.txt and
# requirements-gcs.txt, and those of requirements-tpu.txt or requirements-cuda.txt for the detected
# accelerator; then prints the devices. Run again, it only checks.
#
#   launch/setup_host.sh [--accelerator=tpu|cuda|none] [--venv=DIR] [--dry_run]
#
#   --accelerator  default: detected from /dev
#   --venv         default: .venv in this checkout, where the other scripts look for it
#   --dry_run      print every command, run none
#
# Ubuntu 22.04, which TPU VMs have, comes with Python 3.10. uv uses a newer Python if the host has
# one and otherwise downloads one, without root or Ubuntu's package archive.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly UV_VERSION=0.13.9 PYTHONS=">=3.11,<3.14"

fail() {
  echo "error: $1" >&2
  exit 2
}

parse_arguments() {
  accelerator="" venv=.venv dry_run=""
  local argument
  for argument; do
    case "$argument" in
      --help) sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' && exit ;;
      --accelerator=tpu | --accelerator=cuda | --accelerator=none) accelerator=${argument#*=} ;;
      --accelerator=*) fail "--accelerator must be tpu, cuda or none, got '${argument#*=}'" ;;
      --venv=?*) venv=${argument#*=} ;;
      --dry_run) dry_run=yes ;;
      *) fail "unknown argument $argument. See --help" ;;
    esac
  done
  accelerator=${accelerator:-$(detect_accelerator)}
}

# The files belong to the drivers: /dev/accel to TPU v4 and older, /dev/vfio to newer TPUs.
detect_accelerator() {
  if compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
    echo cuda
  elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
    echo tpu
  else
    echo none
  fi
}

# Runs a command; with --dry_run prints it instead.
execute() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# Sets `uv` to the host's uv, or installs one in a folder next to the environment.
find_uv() {
  if command -v uv >/dev/null; then
    uv=uv
    return
  fi
  uv=$venv-uv/bin/uv
  [[ -x "$uv" ]] && return
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    # Ubuntu has the venv module in a separate package.
    execute sudo apt-get update --quiet
    execute sudo apt-get install --quiet --yes python3-venv
  fi
  execute python3 -m venv "$venv-uv"
  execute "$venv-uv/bin/python" -m pip install --quiet "uv==$UV_VERSION"
}

# Sets `requirements` to the files of the packages.
list_requirements() {
  requirements=(requirements.txt requirements-gcs.txt)
  [[ "$accelerator" == none ]] || requirements+=("requirements-$accelerator.txt")
}

# Changes if the packages have to be installed again.
fingerprint() { echo "$accelerator $(cat "${requirements[@]}" | cksum)"; }

install_packages() {
  list_requirements
  if [[ "$(cat "$venv/.installed_by_setup_host" 2>/dev/null)" == "$(fingerprint)" ]]; then
    echo "$venv is up to date"
    return
  fi
  find_uv
  [[ -x "$venv/bin/python" ]] || execute "$uv" venv --quiet --python "$PYTHONS" "$venv"
  execute "$uv" pip install --quiet --python "$venv/bin/python" \
    "${requirements[@]/#/--requirement=}"
  [[ -n "$dry_run" ]] || fingerprint >"$venv/.installed_by_setup_host"
}

# On one of several TPU hosts, JAX would wait for the others, which may not be set up yet.
print_devices() {
  case "$accelerator" in
    tpu) execute "$venv/bin/python" -c 'import glob, jax, libtpu; print(jax.__version__, glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))' ;;
    *) execute "$venv/bin/python" -c 'import jax; print(jax.__version__, jax.devices())' ;;
  esac
}

parse_arguments "$@"
install_packages
print_devices
