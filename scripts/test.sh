#!/usr/bin/env bash
# Run the test suite. Arguments go to pytest, for example: bash scripts/test.sh tests/structure -x
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/setup_env.sh"
cd "$root"

# One thread: the networks in the tests are too small to gain from more, and bits then do not depend on the machine's cores.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
