#!/usr/bin/env bash
# Make .venv at the root of the repository, or mend it, with what the demo and the tests need. Called by demo.sh and test.sh.
#
#   bash scripts/setup_env.sh              PYTHON=/path/to/python3.12 bash scripts/setup_env.sh
#
# A machine whose nvidia-smi works gets the default build of torch and the "clip" extra; any other gets the CPU build. A second
# run compares one stamp and ends at once. Nothing outside .venv is written, apart from pip's own cache.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
pins="$root/constraints/cpu.txt"
made="$venv/.flowrl-made"   # this script made the environment, so it may make it anew
ready="$venv/.flowrl-ready" # the last set-up reached its end; holds what it was made from
log="$venv/setup.log"
cpu_index="https://download.pytorch.org/whl/cpu"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

say() { printf 'setup: %s\n' "$*"; }

fail() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

new_enough() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# The first Python that is new enough and can make an environment.
find_python() {
  local candidate seen="" candidates=(python3.13 python3.12 python3.11 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if ! new_enough "$candidate"; then
      seen="$seen $candidate ($("$candidate" --version 2>&1 || true): too old);"
    elif ! "$candidate" -I -c 'import ensurepip, venv' >/dev/null 2>&1; then
      seen="$seen $candidate (no venv module: on Debian and Ubuntu install ${candidate##*/}-venv);"
    else
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "flowrl needs Python 3.11 or newer with the venv module. Found:${seen:- none of ${candidates[*]}}" \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash scripts/test.sh"
}

# What the environment depends on, as one hash.
fingerprint() {
  "$python" -I - "$root" "$accelerator" "$extras" <<'PY'
import hashlib
import sys
from pathlib import Path

root, *words = sys.argv[1:]
digest = hashlib.sha256("\0".join([root, *words, sys.version]).encode())
for name in ("pyproject.toml", "constraints/cpu.txt"):
    digest.update((Path(root) / name).read_bytes())
print(digest.hexdigest())
PY
}

# Exit 0 when the index answers in five seconds. The thread bounds the name look-up too, which urllib's timeout does not.
index_answers() {
  "$python" -I - "$1/torch/" <<'PY'
import os
import sys
import threading
import urllib.request

answers = []


def probe():
    try:
        request = urllib.request.Request(sys.argv[1], method="HEAD")
        answers.append(urllib.request.urlopen(request, timeout=5).status)
    except OSError:
        pass


thread = threading.Thread(target=probe, daemon=True)
thread.start()
thread.join(5)
os._exit(0 if answers == [200] else 1)
PY
}

pip_install() { "$python" -I -m pip install --progress-bar off "$@" >>"$log" 2>&1; }

pip_failed() {
  tail -n 20 "$log" >&2
  # pip says "from versions: none" both without a network and for a Python that a package has no build for.
  if grep -qE 'from versions: none|NewConnectionError|NameResolutionError|ConnectTimeoutError|ProxyError' "$log"; then
    fail "$1: no package index could be reached, or it has nothing for $("$python" --version) (above: the end of $log)." \
      "Connect this machine, tell pip its proxy or mirror (PIP_PROXY, PIP_INDEX_URL), or choose another Python (PYTHON=...)."
  fi
  fail "$1: pip failed (above: the end of $log). Mend the cause and run this again: it goes on from a clean state."
}

torch_is_right() {
  "$python" -I - "$torch_pin" "$accelerator" >/dev/null 2>&1 <<'PY'
import sys
import torch

pin, accelerator = sys.argv[1:]
right = torch.__version__.split("+")[0] == pin.split("==")[1]
sys.exit(not (right and (accelerator == "cpu" or torch.version.cuda is not None)))
PY
}

install_torch() {
  local start=$SECONDS
  if torch_is_right; then
    return
  fi
  if [[ $accelerator == cpu ]] && index_answers "$cpu_index"; then
    say "installing $torch_pin, CPU build, from $cpu_index"
    # Its dependencies come with the rest: that index need not hold the versions that are pinned here.
    if pip_install --force-reinstall --no-deps --index-url "$cpu_index" "$torch_pin"; then
      say "torch installed ($((SECONDS - start)) s)"
      return
    fi
    say "that index has no $torch_pin for this machine"
  fi
  say "installing $torch_pin from pip's default index"
  pip_install --force-reinstall --no-deps "$torch_pin" || pip_failed "installing $torch_pin"
  say "torch installed ($((SECONDS - start)) s)"
}

install_project() {
  local start=$SECONDS before after
  before="$(torch_version)"
  say "installing flowrl with its dependencies (${extras})"
  pip_install -c "$pins" -e ".[$extras]" || pip_failed "installing flowrl"
  after="$(torch_version)"
  [[ $before == "$after" ]] || fail "torch $before was replaced by $after while flowrl was installed; see $log"
  say "flowrl installed ($((SECONDS - start)) s)"
}

# Without its compiled parts, which CPU processes do not need; its setup wants the torch that is here, and its dependencies
# are named one by one so that nothing replaces that. A machine that cannot get it skips the tests of it.
install_deepspeed() {
  local start=$SECONDS before after
  before="$(torch_version)"
  if pip_install -c "$pins" setuptools wheel einops hjson msgpack ninja packaging psutil py-cpuinfo pydantic &&
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip_install -c "$pins" --no-build-isolation --no-deps deepspeed; then
    say "DeepSpeed installed ($((SECONDS - start)) s)"
  else
    say "DeepSpeed was not installed (see $log): distributed.sharding=zero1, zero2 and zero3 are off, and their tests skipped"
  fi
  after="$(torch_version)"
  [[ $before == "$after" ]] || fail "torch $before was replaced by $after while DeepSpeed was installed; see $log"
}

torch_version() { "$python" -I -c 'import importlib.metadata as m; print(m.version("torch"))'; }

make_venv() {
  local start=$SECONDS base
  if [[ -e $venv && ! -e $made ]]; then
    new_enough "$python" || fail "$venv exists, was not made by this script and has no working Python 3.11 or newer. Remove or rename it."
    "$python" -I -m pip --version >/dev/null 2>&1 || fail "$venv was not made by this script and has no pip. Remove or rename it."
    say "using the environment that is in $venv"
    return
  fi
  if [[ -e $ready ]] && new_enough "$python"; then
    return
  fi
  base="$(find_python)"
  [[ ! -e $made ]] || say "an earlier set-up did not reach its end: making .venv anew"
  say "making $venv with $base ($("$base" --version 2>&1))"
  mkdir -p "$venv"
  : >"$made"
  # Not venv --clear: a kill in the middle of it would leave a folder without this script's mark.
  find "$venv" -mindepth 1 -maxdepth 1 ! -name "${made##*/}" -exec rm -rf {} +
  "$base" -I -m venv "$venv" || fail "$base -m venv failed; see above"
  say "environment made ($((SECONDS - start)) s)"
}

cd "$root"
total=$SECONDS
accelerator=cpu
extras=dev
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q .; then
  accelerator=cuda
  extras=dev,clip
fi
torch_pin="$(sed -n 's/^\(torch==[^ ;#]*\).*$/\1/p' "$pins")"
[[ -n $torch_pin ]] || fail "$pins has no line torch==VERSION"

if [[ -e $ready ]] && new_enough "$python" && [[ "$(cat "$ready")" == "$(fingerprint)" ]]; then
  exit 0
fi
make_venv
rm -f "$ready"
: >"$log"
install_torch
install_project
install_deepspeed
"$python" -I -c 'import torch, flowrl' || fail "the environment was made but does not import torch and flowrl; see above and $log"
fingerprint >"$ready"
say "ready in $((SECONDS - total)) s: torch $(torch_version), $accelerator"
