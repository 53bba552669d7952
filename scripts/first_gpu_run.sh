#!/bin/sh
# Everything that a GPU is wanted for first, in 11 minutes: docs/gpu.md.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m scripts.gpu_run first "$@"
