#!/usr/bin/env bash
# All that only a GPU can show, the most valuable first: two minutes of smoke, throughput with a profile, fast94 and onecycle over
# some seeds, the tests marked gpu, ablations. Meant to take ten minutes where no compilation is slow, at most 29. Nothing else
# should use the GPU meanwhile: the parts come one after the other, the tests on several cores where pytest-xdist is installed.
#   bash benchmarks/gpu_session.sh RESULTS DATA [PYTHON]
# RESULTS receives JSON, traces and logs; DATA is what data.root takes, or - to train on random images. Needs torch,
# torchvision, matplotlib, pytest, and DALI for the pipeline, importable by PYTHON; the project need not be installed.
# A part that fails or takes too long is noted, and the next one starts; what it had finished by then is written. Started
# again with the same RESULTS, it passes over the parts that are done, and goes on with the others: remove NAME.state to
# repeat one. Results of another commit, GPU or command line are replaced.
set -uo pipefail
results=${1:?usage: gpu_session.sh RESULTS DATA [PYTHON]}
data=${2:?usage: gpu_session.sh RESULTS DATA [PYTHON]}
python=${3:-python3}
mkdir -p "$results" && results=$(cd "$results" && pwd)
if [ "$data" = - ]; then
  data_words=(data.name=synthetic schedule.lr_max=0.4 schedule.lr_min=0.002)  # a range test finds nothing in noise
else
  data_words=("data.root=$(cd "$data" && pwd)" data.download=false)
fi
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv >"$results/gpu.csv" 2>&1
machine="$(git rev-parse HEAD 2>/dev/null) $(sed -n 2p "$results/gpu.csv")"
begun=$SECONDS
summary=()

part() { # NAME SECONDS "ITS FILES" COMMAND...
  local name=$1 limit=$2 files=$3 start=$SECONDS code key file
  shift 3
  key="$machine $*"
  if [ "$(head -n 1 "$results/$name.state" 2>/dev/null)" != "$key" ]; then
    for file in $files; do rm -f -- "$results/$file"; done
    printf '%s\n' "$key" >"$results/$name.state"
  elif [ "$(sed -n 2p "$results/$name.state")" = done ]; then
    summary+=("$name: done before")
    return
  fi
  echo "== $name: $*"
  # an interrupt, as from the keyboard: pytest then still lists what failed
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
  code=$?
  tail -n 25 "$results/$name.log" | cut -c1-300
  case $code in
    0) code=done && echo done >>"$results/$name.state" ;;
    124 | 137) code="stopped after $limit s" ;;
    *) code="exit code $code" ;;
  esac
  summary+=("$name: $code, $((SECONDS - start)) s")
}

part smoke 240 "smoke.json" "$python" benchmarks/smoke.py --json "$results/smoke.json" train.device=cuda
part throughput 360 "throughput.json trace.json trace.json.gz" "$python" benchmarks/throughput.py \
  --json "$results/throughput.json" --repeats 5 --no-footprint --profile "$results/trace.json"
# their finished runs stay in the JSONL files, and are not repeated; further seeds: gpu_recipes.sh
fast_words=("${data_words[@]}")
if [ "$data" = - ]; then fast_words=(data.name=synthetic); fi
part fast94 150 "fast94.json fast94.jsonl" "$python" benchmarks/accuracy.py configs/fast94.yaml --runs 5 \
  "${fast_words[@]}" --finished "$results/fast94.jsonl" --json "$results/fast94.json"
part onecycle 150 "onecycle.json onecycle.jsonl" "$python" benchmarks/accuracy.py configs/onecycle.yaml --runs 3 \
  "${data_words[@]}" --finished "$results/onecycle.jsonl" --json "$results/onecycle.json"
several=()
if "$python" -c "import xdist" 2>/dev/null; then several=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist worksteal); fi
part tests 420 "" "$python" -m pytest -m gpu -v --tb=short --durations=10 -p no:cacheprovider "${several[@]}" \
  --continue-on-collection-errors
# compile last: max-autotune, its last setting, can take minutes
part ablations 360 "ablations.json ablations.png" "$python" benchmarks/throughput.py --quick --no-peers \
  --json "$results/ablations.json" --picture "$results/ablations.png" \
  --ablate step_graph --ablate graph --ablate strips --ablate prefetch --ablate pipelines --ablate batch --ablate compile
if [ -f "$results/trace.json" ]; then gzip -f "$results/trace.json"; fi

echo
echo "== summary ($((SECONDS - begun)) s)"
printf '%s\n' "${summary[@]}"
"$python" - "$results" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
path = folder / "smoke.json"
if path.exists():
    for check in json.loads(path.read_text())["checks"]:
        print("ok:" if check["ok"] else "FAILED:", check["name"], "-", check["said"])
path = folder / "throughput.json"
if path.exists():
    report = json.loads(path.read_text())
    for stage, rate in {**report["stages"], **report["peers"]}.items():
        print(f"{stage}: {rate['median']:,.0f} images/s")
    print("ratios:", json.dumps({k: round(v, 4) for k, v in report["ratios"].items()}))
    print("verdict:", report.get("verdict"), "; training's peak of GPU memory, GiB:", report.get("device_peak_gib"))
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
for path in (folder / "fast94.json", folder / "onecycle.json"):
    if path.exists():
        report = json.loads(path.read_text())
        print(path.stem + ":", json.dumps({k: report.get(k) for k in ("accuracy", "shift_accuracy", "seconds", "seconds_to_94")}))
PYTHON
echo
echo "== predicted (benchmarks/roofline.py), and measured where throughput.json has the step"
measured=()
if grep -qs '"step"' "$results/throughput.json"; then measured=(--measured "$results/throughput.json"); fi
plans=(tests/rehearsal/plans/*.json)
"$python" benchmarks/roofline.py --plan "${plans[-1]}" "${measured[@]}" --json "$results/roofline.json"
