# The arguments of tpu_vm.sh, checked. Sourced.
# shellcheck shell=bash disable=SC2034  # The names set here are read there.

readonly STEPS="create wait setup run logs status stop delete"

fail() {
  echo "error: $1" >&2
  exit 2
}

show_help() {
  sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p'
  exit
}

read_arguments() {
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
        [[ $# -gt 1 ]] || fail "--env is followed by nothing; pass --env KEY=VALUE"
        environment[${#environment[@]}]=$2
        shift
        ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      --config* | --workdir*) fail "$1 is for the run; put it after --" ;;
      -*) fail "$1 is no option; see --help" ;;
      *)
        [[ -z "$step" ]] || fail "'$1' follows the step '$step'; pass one step"
        [[ " $STEPS " == *" $1 "* ]] || fail "'$1' is no step; choose $STEPS, or none for all"
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
  [[ -n "$name" ]] || fail "--name is missing; pass e.g. --name=mixer"
  [[ "$name" =~ ^[a-z]([a-z0-9-]{0,58}[a-z0-9])?$ ]] ||
    fail "--name=$name is no name of a machine; pass up to 60 of a-z, 0-9 and -, a letter first"
  [[ -n "$zone" ]] || fail "--zone is missing; pass e.g. --zone=us-west4-a"
  [[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    fail "--zone=$zone is no zone; pass e.g. us-west4-a, with the letter at its end"
  [[ -z "$slices" || "$slices" =~ ^[1-9][0-9]*$ ]] ||
    fail "--slices=$slices is no number of slices; pass 1 or more"
  [[ "$max_restarts" =~ ^[0-9]+$ ]] ||
    fail "--max_restarts=$max_restarts is no number of restarts; pass 0 or more"
  case "$step" in "" | create) check_type ;; esac
}

# Sets `version` by the type, unless it is given. The versions are those that Google's page on TPU
# software names for JAX.
check_type() {
  local default
  [[ -n "$type" ]] || fail "--type is missing; pass e.g. --type=v5litepod-64"
  case "$type" in
    v2-* | v3-* | v4-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    v5e-*) fail "--type=$type is called v5litepod-${type#v5e-} by this API; pass that" ;;
    tpu7x* | v7*) fail "--type=$type is not served by the Cloud TPU API; use launch/gke/tpu7x.yaml" ;;
    *) fail "--type=$type is unknown; pass v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a size" ;;
  esac
  [[ "${type#*-}" =~ ^[1-9][0-9]*$ ]] || fail "--type=$type has no size; pass e.g. ${type%%-*}-8"
  case "$type" in
    v2-* | v3-*) [[ ${slices:-1} == 1 ]] || fail "--slices=$slices needs v4 or newer, not $type" ;;
  esac
  version=${version:-$default}
}

check_environment() {
  local setting
  for setting in ${environment[@]+"${environment[@]}"}; do
    [[ "$setting" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail "--env $setting is no setting; pass KEY=VALUE"
  done
}

# The run must be able to go on elsewhere.
check_run() {
  local config="" workdir="" before="" argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case "$before" in --config) config=$argument ;; --workdir) workdir=$argument ;; esac
    case "$argument" in
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
    before=$argument
  done
  [[ -n "$config" ]] ||
    fail "there is no --config after --; pass e.g. -- --config=configs/mixer_b16_i1k.py"
  [[ -n "$workdir" ]] || fail "there is no --workdir after --; pass e.g. --workdir=gs://BUCKET/run"
  [[ "$workdir" == gs://?* ]] ||
    fail "--workdir=$workdir is on the machines, which vanish with what is on them; pass gs://..."
}
