#!/bin/sh
# The shipped model's recipe on a GPU, in 10 minutes; run it again to go on: docs/gpu.md.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m scripts.gpu_run second "$@"
