#!/usr/bin/env bash
# Prove and measure fastarat on this machine's GPU in one command of less than nine minutes, from a bare checkout.
#
#   bash benchmarks/gpu_check.sh             on a GPU: five parts, most telling first, as somebody may cut it short
#   bash benchmarks/gpu_check.sh --only a,b  these parts alone
#   bash benchmarks/gpu_check.sh --dry       the same on a CPU at tiny sizes, to prove that it would run
#
#   a  the machine; a captured step against its eager twin, cuDNN's fused convolutions by layer with and without
#      compiling at run time, an empty kernel's gap, cuDNN's autotuning of ten plans and of all (first.json); the
#      kernels of one eager step (profile.json)
#   b  AR-AT, ResNet-18, batch 128, one speed-up at a time, beside the released structure (ladder.json)
#   c  three epochs of training, then clean and PGD accuracy on test images (train.json)
#   d  TRADES and AT, batch 512, WRN-34-10: the last speed-ups (matrix.json)
#   e  the tests of kernels and capture, compiled (tests.xml)
#
# Nothing is fetched or installed, and no setting of the card is changed. From the environment:
#   OUT            folder of the results (default benchmarks/out): at most 8 files
#   PYTHON         interpreter that has PyTorch (default python3)
#   WHEELS         folder of wheels this machine lacks; they are unpacked into a scratch folder
#   CIFAR_ARCHIVE  archive of CIFAR-10 as an image folder (train/CLASS/*, test/CLASS/*); without it, random images
# Exit code: 1 when a test failed or did not finish, or a part ended with an error (an unequal rung among them); else 0.
# A part that ran out of time is recorded in summary.md, leaves what it has, and fails nothing but the tests.
set -u -o pipefail

dry=0 only=a,b,c,d,e
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=1 ;;
    --only) only=${2:-} && shift ;;
    --only=*) only=${1#--only=} ;;
    -h | --help) sed -n '2,24s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check.sh: unknown argument $1 (known: --dry, --only PARTS, --help)" >&2; exit 2 ;;
  esac
  shift || break
done
if ! [[ $only =~ ^[a-e](,[a-e])*$ ]]; then
  echo "gpu_check.sh: --only '$only': expected parts out of a to e with commas between them, such as a,b" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/benchmarks/out}
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/{log.txt,summary.md}
log=$out/log.txt
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=$scratch/status
: >"$status"
# What the steps are allowed adds up to it; what they leave of that is the next ones': `spare`.
deadline=$(($(date +%s) + 515))
spare=0
failed=0
results=()

# kernels/ is shipped as fastarat.kernels: lay the packages out as an installation would have them.
mkdir -p "$scratch/layout/fastarat" "$scratch/site"
for item in "$root"/fastarat/*; do
  [ "${item##*/}" = __pycache__ ] || ln -s "$item" "$scratch/layout/fastarat/"
done
ln -s "$root/kernels" "$scratch/layout/fastarat/kernels"
ln -s "$root/benchmarks" "$scratch/layout/benchmarks"
export PYTHONPATH="$scratch/layout:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
# The checkout's own fastarat/, which has no kernels, must not win because it lies in the working directory.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
cd "$root" || exit 2

# allow SECONDS [MOST]: set `limit`, a step's own time and what is spare, never more than MOST or than is left in all.
# A dry run measures nothing, and a busy machine may take its time.
allow() {
  local left=$((deadline - $(date +%s)))
  [ $dry = 0 ] || { limit=240; return; }
  spare=$((spare + $1))
  limit=$spare
  [ "$limit" -le "${2:-$limit}" ] || limit=$2
  [ "$limit" -le "$left" ] || limit=$left
}

# step PART NAME COMMAND...: run within `limit`; leaves rc.
step() {
  local part=$1 name=$2 began took outcome
  shift 2
  if [ "$limit" -lt 5 ]; then
    rc=124
    echo "| $part | $name | no time left | 0 |" >>"$status"
    return
  fi
  echo "=== $name (at most $limit s)" | tee -a "$log"
  began=$(date +%s)
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  rc=$?
  took=$(($(date +%s) - began)) outcome="exit code $rc"
  [ $rc -eq 137 ] && rc=124
  [ $rc -eq 0 ] && outcome=done
  [ $rc -eq 124 ] && outcome="stopped by the clock"
  spare=$((took < spare ? spare - took : 0))
  echo "| $part | $name | $outcome | $took |" >>"$status"
  echo "    $outcome, $took s" | tee -a "$log"
  [ $rc -eq 0 ] || [ $rc -eq 124 ] || failed=1
}

# chosen PART FILE...: whether it is to run; what an earlier run left in its files is removed.
chosen() {
  [[ ,$only, == *,$1,* ]] || return 1
  local file
  for file in "${@:2}"; do
    rm -f "$out/$file"
    results+=("$file")
  done
}

if [ -n "${WHEELS:-}" ]; then
  allow 60
  step - wheels "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl
  spare=0
fi

benchmarks=("$python" -m benchmarks)
[ $dry = 1 ] && small=(--dry --threads 1) || small=()
# Seconds after which a step starts nothing new, so that it ends by itself: the last thing it started is still to finish.
budget() { [ $dry = 1 ] || echo "--budget $((limit > 40 ? limit - $1 : limit / 2))"; }

if chosen a first.json profile.json; then
  allow 40
  step a machine bash -c '
    uname -a; free -g 2>/dev/null
    if command -v nvidia-smi >/dev/null; then nvidia-smi; nvidia-smi -q -d CLOCK,POWER,PERFORMANCE; fi
    command -v nvcc >/dev/null && nvcc --version
    "$0" -m fastarat.cli doctor' "$python"
  allow 92
  # Its questions are processes of their own, which end when the budget does.
  step a first "${benchmarks[@]}" first "${small[@]}" $(budget 5) --out "$out/first.json"
  allow 38
  step a profile "${benchmarks[@]}" profile "${small[@]}" --out "$out/profile.json" ar-at:resnet18:128
fi

if chosen b ladder.json; then
  allow 135 175
  step b ladder "${benchmarks[@]}" ladder "${small[@]}" $(budget 25) --out "$out/ladder.json" ar-at:resnet18:128
fi

# save_training: what training and evaluation have left so far.
save_training() {
  "$python" - "$scratch/run" "$data" "$out/train.json" "${CIFAR_ARCHIVE:+archive}" <<'PY' >>"$log" 2>&1
import json
import sys
from pathlib import Path

run, data, out, archive = Path(sys.argv[1]), *sys.argv[2:5]
rows, card, found = (run / name for name in ("metrics.jsonl", "card.txt", "eval.json"))
record = {
    "kind": "train",
    "data": Path(data).name if archive else "random images: accuracies mean nothing",
    "card": card.read_text() if card.exists() else None,
    "metrics": [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [],
    "evaluation": json.loads(found.read_text()) if found.exists() else None,
}
Path(out).write_text(json.dumps(record, indent=1) + "\n")
PY
}

if chosen c train.json; then
  data=${CIFAR_ARCHIVE:-}
  if [ -z "$data" ]; then
    data=$scratch/random-images
    "$python" - "$data" $((dry ? 8 : 256)) <<'PY' >>"$log" 2>&1
import sys
from pathlib import Path

import numpy as np
from PIL import Image

root, count = Path(sys.argv[1]), int(sys.argv[2])
random = np.random.default_rng(0)
for part, images in (("train", count), ("test", max(count // 8, 1))):
    for label in range(10):
        folder = root / part / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(images):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
PY
  fi
  sizes=(--model resnet18 --amp --epochs 3) tested=(--attack clean,pgd-20 --limit 1000)
  if [ $dry = 1 ]; then
    sizes=(--model resnet-small --epochs 1 --batch-size 16 --attack.num-steps 2 --eval.num-steps 2)
    tested=(--attack clean,pgd-2 --limit 8)
  fi
  allow 75
  step c train "$python" -m fastarat.cli train --dataset "$data" --data-dir "$scratch/data" --loader resident \
    --no-tensorboard "${sizes[@]}" --out "$scratch/run"
  save_training
  if [ -f "$scratch/run/last.pt" ]; then
    allow 20
    step c eval "$python" -m fastarat.cli eval "$scratch/run" "${tested[@]}"
    save_training
  fi
fi

if chosen d matrix.json; then
  setups=(trades:resnet18:128:short at:resnet18:128:short ar-at:resnet18:512:short ar-at:wrn-34-10:128:short)
  setups+=(at-eval:resnet18:128:short ar-at:preactresnet18:128:short trades:wrn-34-10:128:short)
  [ $dry = 1 ] && setups=(trades:resnet18:128:short)
  # The tests after it have time of their own: it is not to take theirs.
  allow 40
  step d matrix "${benchmarks[@]}" ladder "${small[@]}" $(budget 25) --out "$out/matrix.json" "${setups[@]}"
fi

if chosen e tests.xml; then
  cases=(tests/kernels tests/test_graphs.py)
  [ $dry = 1 ] && cases=(tests/kernels/test_pgd_update.py tests/test_graphs.py -k "owned or refused or rounding")
  [ $dry = 0 ] && "$python" -c 'import xdist' 2>/dev/null && cases+=(-n 8)
  allow 75
  step e tests "$python" -m pytest -q -p no:cacheprovider --junitxml "$out/tests.xml" "${cases[@]}"
  [ $rc -eq 0 ] || failed=1
fi

{
  echo "# fastarat on this machine$([ $dry = 1 ] && echo " (dry run: sizes too small to say anything about speed)")"
  printf '\n| part | step | outcome | s |\n| --- | --- | --- | --- |\n'
  cat "$status"
  echo
  tables=()
  for name in "${results[@]}"; do
    case $name in
      tests.xml | train.json) ;;
      *) [ -s "$out/$name" ] && tables+=("$out/$name") ;;
    esac
  done
  chosen_file() { [[ " ${results[*]} " == *" $1 "* ]] && echo "$out/$1" || echo "$scratch/none"; }
  "$python" - "$(chosen_file tests.xml)" "$(chosen_file train.json)" <<'PY'
import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

tests, train = map(Path, sys.argv[1:])
if tests.exists():
    cases = list(xml.parse(tests).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    print(f"Tests: {len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped.")
    for c in bad:
        print(f"- {c.get('classname')}::{c.get('name')}")
    print()
if train.exists():
    record = json.loads(train.read_text())
    print(f"Training ({record['data']}):\n")
    for row in record["metrics"]:
        print("- " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
    if record["evaluation"]:
        print("- test images: " + ", ".join(f"{k} {v:.4g}" for k, v in record["evaluation"]["accuracy"].items()))
    print()
PY
  [ ${#tables[@]} -eq 0 ] || "${benchmarks[@]}" table "${tables[@]}"
} >"$out/summary.md" 2>>"$log"
cat "$out/summary.md"
[ $failed = 0 ] || echo "FAILED: see $log"
exit $failed
