#!/bin/sh
# The shipped model's recipe on a GPU, in 10 minutes; run it again to go on: docs/gpu.md.
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" # nothing needs to be installed
exec "${PYTHON:-python3}" -m scripts.gpu_run second "$@"
