#!/usr/bin/env bash
# Prove and measure fastarat on this machine's GPU in one command of less than nine minutes, from a bare checkout.
#
#   bash benchmarks/gpu_check.sh          on a GPU: kernels and captured steps tested, then benchmarks, then a training
#   bash benchmarks/gpu_check.sh --dry    the same on a CPU at tiny sizes, to prove that it would run
#
# Nothing is fetched or installed, and no setting of the card is changed. From the environment:
#   OUT            folder of the results (default benchmarks/out): at most 8 files
#   PYTHON         interpreter that has PyTorch (default python3)
#   WHEELS         folder of wheels this machine lacks; they are unpacked into a scratch folder
#   CIFAR_ARCHIVE  archive of CIFAR-10 as an image folder (train/CLASS/*, test/CLASS/*); without it, random images
# Exit code: 1 when a test failed or did not finish, or a part ended with an error (an unequal rung among them); else 0.
# A part that ran out of time is recorded in summary.md and fails nothing but the tests.
set -u -o pipefail

dry=0
for word in "$@"; do
  case $word in
    --dry) dry=1 ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu_check.sh: unknown argument $word (known: --dry, --help)" >&2; exit 2 ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/benchmarks/out}
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/{log.txt,summary.md,tests.xml,ladder.json,matrix.json,first.json,bench.json,train.json}
log=$out/log.txt
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=$scratch/status
: >"$status"
deadline=$(($(date +%s) + 510))
failed=0

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

# part NAME SECONDS COMMAND...: run within its own and the whole's time; leaves rc.
part() {
  local name=$1 limit=$2 left=$((deadline - $(date +%s))) began
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    rc=124
    echo "| $name | no time left | 0 |" >>"$status"
    return
  fi
  echo "=== $name (at most $limit s)" | tee -a "$log"
  began=$(date +%s)
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  rc=$?
  local took=$(($(date +%s) - began)) outcome="exit code $rc"
  [ $rc -eq 0 ] && outcome=done
  [ $rc -eq 124 ] || [ $rc -eq 137 ] && outcome="stopped by the clock"
  echo "| $name | $outcome | $took |" >>"$status"
  echo "    $outcome, $took s" | tee -a "$log"
}

# soft SECONDS: what a part may spend on starting new work, so that it ends by itself.
soft() {
  local left=$((deadline - $(date +%s)))
  [ "$1" -le "$left" ] && left=$1
  echo $((left > 40 ? left - 25 : left / 2))
}

if [ -n "${WHEELS:-}" ]; then
  part wheels 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$WHEELS"/*.whl
fi

part machine 60 bash -c '
  uname -a; free -g 2>/dev/null
  if command -v nvidia-smi >/dev/null; then nvidia-smi; nvidia-smi -q -d CLOCK,POWER,PERFORMANCE; fi
  command -v nvcc >/dev/null && nvcc --version
  "$0" -m fastarat.cli doctor' "$python"

# Decoding an archive takes a processor a while: it is done while the tests run, which measure nothing.
decoding=
if [ -n "${CIFAR_ARCHIVE:-}" ]; then
  timeout 150 "$python" -m fastarat.cli data info "$CIFAR_ARCHIVE" --data-dir "$scratch/data" >>"$log" 2>&1 &
  decoding=$!
fi

jobs=()
"$python" -c 'import xdist' 2>/dev/null && jobs=(-n 8)
if [ $dry = 1 ]; then
  part tests 120 "$python" -m pytest -q -p no:cacheprovider --junitxml "$out/tests.xml" \
    tests/kernels/test_pgd_update.py tests/test_graphs.py -k "owned or refused or rounding"
else
  part tests 130 "$python" -m pytest -q -p no:cacheprovider "${jobs[@]}" --junitxml "$out/tests.xml" \
    tests/kernels tests/test_graphs.py
fi
[ $rc -eq 0 ] || failed=1
[ -z "$decoding" ] || wait "$decoding"

if [ $dry = 1 ]; then
  part ladder 120 "$python" -m benchmarks ladder --dry --threads 1 --out "$out/ladder.json" ar-at:resnet18:128
else
  part ladder 110 "$python" -m benchmarks ladder --budget "$(soft 110)" --out "$out/ladder.json" ar-at:resnet18:128
fi
[ $rc -eq 0 ] || [ $rc -eq 124 ] || failed=1

if [ $dry = 1 ]; then
  part bench 120 "$python" -m fastarat.cli bench --defense at,trades --model resnet-small --batch-size 4 --repeats 2 \
    --steps 1 --threads 1 --attack.num-steps 2 --out "$out/bench.json"
else
  part bench 60 "$python" -m fastarat.cli bench --defense ar-at,at,trades --repeats 10 --steps 20 --out "$out/bench.json"
fi
[ $rc -eq 0 ] || [ $rc -eq 124 ] || failed=1

if [ $dry = 1 ]; then
  part first 120 "$python" -m benchmarks first --dry --threads 1 --out "$out/first.json"
else
  part first 80 "$python" -m benchmarks first --budget "$(soft 80)" --out "$out/first.json"
fi
[ $rc -eq 0 ] || [ $rc -eq 124 ] || failed=1

sizes=(--model resnet18 --amp --epochs 2)
[ $dry = 1 ] && sizes=(--model resnet-small --epochs 1 --batch-size 16 --attack.num-steps 2 --eval.num-steps 2)
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
part train 70 "$python" -m fastarat.cli train --dataset "$data" --data-dir "$scratch/data" --loader resident \
  --no-tensorboard "${sizes[@]}" --out "$scratch/run"
[ $rc -eq 0 ] || [ $rc -eq 124 ] || failed=1
"$python" - "$scratch/run" "$data" "$out/train.json" "${CIFAR_ARCHIVE:+archive}" <<'PY' >>"$log" 2>&1
import json
import sys
from pathlib import Path

run, data, out, archive = Path(sys.argv[1]), *sys.argv[2:5]
rows = run / "metrics.jsonl"
record = {
    "kind": "train",
    "data": Path(data).name if archive else "random images: accuracies mean nothing",
    "card": (run / "card.txt").read_text() if (run / "card.txt").exists() else None,
    "metrics": [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [],
}
Path(out).write_text(json.dumps(record, indent=1) + "\n")
PY

# Last, because it uses whatever time is left: other methods, networks and batch sizes.
if [ $dry = 1 ]; then
  part matrix 120 "$python" -m benchmarks ladder --dry --threads 1 --out "$out/matrix.json" trades:resnet18:128:short
else
  setups=(trades:resnet18:128 ar-at:resnet18:512:short at:resnet18:128:short at-eval:resnet18:128:short)
  setups+=(ar-at:resnet18:256:short ar-at:preactresnet18:128:short ar-at:wrn-34-10:128:short)
  part matrix 400 "$python" -m benchmarks ladder --budget "$(soft 400)" --out "$out/matrix.json" "${setups[@]}"
fi
[ $rc -eq 0 ] || [ $rc -eq 124 ] || failed=1

{
  echo "# fastarat on this machine$([ $dry = 1 ] && echo " (dry run: sizes too small to say anything about speed)")"
  printf '\n| part | outcome | s |\n| --- | --- | --- |\n'
  cat "$status"
  echo
  "$python" - "$out/tests.xml" "$out/train.json" <<'PY'
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
    print()
PY
  results=()
  for name in ladder matrix bench first; do
    [ -s "$out/$name.json" ] && results+=("$out/$name.json")
  done
  [ ${#results[@]} -eq 0 ] || "$python" -m benchmarks table "${results[@]}"
} >"$out/summary.md" 2>>"$log"
cat "$out/summary.md"
[ $failed = 0 ] || echo "FAILED: see $log"
exit $failed
