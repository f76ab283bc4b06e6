# Parses and checks the arguments of tpu_vm.sh. Sourced.
# shellcheck shell=bash disable=SC2034  # tpu_vm.sh and tpu_commands.sh read the names set here.

readonly STEPS="create wait setup run logs status stop delete"

fail() {
  echo "error: $1" >&2
  exit 2
}

show_help() {
  sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p'
  exit
}

parse_arguments() {
  step="" name="" type="" zone="" project="" version="" slices="" spot="" keep="" dry_run=""
  max_restarts=100 environment=() arguments=() create_flags=()
  poll_seconds=${MIXER_POLL_SECONDS:-30}
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --help) show_help ;;
      --name=* | --type=* | --zone=* | --project=* | --version=* | --slices=* | --max_restarts=*)
        local key=${1%%=*}
        printf -v "${key#--}" %s "${1#*=}"
        ;;
      --spot | --keep | --dry_run) printf -v "${1#--}" yes ;;
      --create_flag=*) create_flags[${#create_flags[@]}]=${1#*=} ;;
      --env=*) environment[${#environment[@]}]=${1#*=} ;;
      --env)
        [[ $# -gt 1 ]] || fail "--env must be followed by KEY=VALUE"
        environment[${#environment[@]}]=$2
        shift
        ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      --config* | --workdir*) fail "$1 is an argument of the run. Pass it after --" ;;
      -*) fail "unknown option $1. See --help" ;;
      *)
        [[ -z "$step" ]] || fail "there must be one step, got '$step' and '$1'"
        [[ " $STEPS " == *" $1 "* ]] || fail "the step must be one of $STEPS, got '$1'. Leave it out to run all"
        step=$1
        ;;
    esac
    shift
  done
  check_machines
  check_environment
  case "$step" in "" | run) check_run ;; esac
}

check_machines() {
  [[ -n "$name" ]] || fail "--name is missing. Pass e.g. --name=mixer"
  [[ "$name" =~ ^[a-z]([a-z0-9-]{0,58}[a-z0-9])?$ ]] ||
    fail "--name must be up to 60 of a-z, 0-9 and -, starting with a letter, got '$name'"
  [[ -n "$zone" ]] || fail "--zone is missing. Pass e.g. --zone=us-west4-a"
  [[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    fail "--zone must be a zone with its letter, such as us-west4-a, got '$zone'"
  [[ -z "$slices" || "$slices" =~ ^[1-9][0-9]*$ ]] ||
    fail "--slices must be 1 or more, got '$slices'"
  [[ "$max_restarts" =~ ^[0-9]+$ ]] ||
    fail "--max_restarts must be 0 or more, got '$max_restarts'"
  case "$step" in "" | create) check_type ;; esac
}

# Sets `version` for the type, unless --version sets it. The versions are those that Google's page on
# TPU software versions lists for JAX.
check_type() {
  local default
  [[ -n "$type" ]] || fail "--type is missing. Pass e.g. --type=v5litepod-64"
  case "$type" in
    v2-* | v3-* | v4-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    v5e-*) fail "--type=$type is v5litepod-${type#v5e-} in this API. Pass that" ;;
    tpu7x* | v7*) fail "--type=$type is not in the Cloud TPU API. Use launch/gke/tpu7x.yaml" ;;
    *) fail "--type must be v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a size, got '$type'" ;;
  esac
  [[ "${type#*-}" =~ ^[1-9][0-9]*$ ]] ||
    fail "--type must end with a size, such as ${type%%-*}-8, got '$type'"
  case "$type" in
    v2-* | v3-*) [[ ${slices:-1} == 1 ]] || fail "--slices=$slices needs v4 or newer, got $type" ;;
  esac
  version=${version:-$default}
}

check_environment() {
  local setting
  for setting in ${environment[@]+"${environment[@]}"}; do
    [[ "$setting" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail "--env must be KEY=VALUE, got '$setting'"
  done
}

# Checks that the run can be resumed on other machines.
check_run() {
  local config="" workdir="" previous="" argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case "$previous" in --config) config=$argument ;; --workdir) workdir=$argument ;; esac
    case "$argument" in
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
    previous=$argument
  done
  [[ -n "$config" ]] ||
    fail "--config is missing after --. Pass e.g. -- --config=configs/mixer_b16_i1k.py"
  [[ -n "$workdir" ]] ||
    fail "--workdir is missing after --. Pass e.g. --workdir=gs://BUCKET/run"
  [[ "$workdir" == gs://?* ]] ||
    fail "--workdir must be a gs:// URL, because the disks of the machines are deleted, got $workdir"
}
