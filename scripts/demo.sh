#!/usr/bin/env bash
# Fine-tune the embedded pipeline with Flow-GRPO, evaluate it on held-out prompts against its base, and write a report.
#
#   bash scripts/demo.sh [key=value ...]     further settings go to "flowrl train", for example seed=1
#
# Each run has a folder of its own: runs/demo, runs/demo-2, ...
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/setup_env.sh"
cd "$root"

run=""
for argument in "$@"; do
  case "$argument" in run_dir=*) run="${argument#run_dir=}" ;; esac
done
if [[ -z $run ]]; then
  run=runs/demo
  number=2
  while [[ -e $run ]]; do
    run="runs/demo-$number"
    number=$((number + 1))
  done
  set -- "run_dir=$run" "$@"
fi

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
.venv/bin/flowrl train demo "$@"

if [[ ! -f $run/report.html ]]; then
  printf 'demo: error: training ended without writing %s/report.html\n' "$run" >&2
  exit 1
fi
report="$(cd "$run" && pwd -P)/report.html"
printf 'demo: open %s\n' "$report"
