#!/bin/sh
# Everything that a GPU is wanted for first, in 11 minutes: docs/gpu.md.
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" # nothing needs to be installed
exec "${PYTHON:-python3}" -m scripts.gpu_run first "$@"
