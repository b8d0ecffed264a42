#!/usr/bin/env bash
# Run a configuration with N training processes on this host under torchrun's launcher, without Ray.
# Gradients and rendezvous stay on the loopback interface.
#
#   cluster/torchrun.sh CONFIG N [options of `genrec run`]
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo 'usage: cluster/torchrun.sh CONFIG N [options of genrec run]' >&2
  exit 2
fi
config=$1 num_workers=$2
shift 2

genrec=$(dirname "$0")/../.venv/bin/genrec
[[ -x $genrec ]] || genrec=genrec

export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
exec "$genrec" run "$config" --set runtime.backend=local --set "runtime.num_workers=$num_workers" "$@"
