#!/usr/bin/env bash
# All that only a GPU can show, in under 8 minutes: the tests marked gpu, throughput, the whole recipe, a profile.
#   bash benchmarks/gpu_session.sh RESULTS DATA [PYTHON]
# RESULTS receives JSON, traces and logs, in place of an earlier session's; DATA is what data.root takes, or - to train on
# random images. Needs torch, torchvision, matplotlib, pytest, and DALI for the pipeline, importable by PYTHON; the project
# need not be installed.
# A part that fails or takes too long is noted, and the next one starts; what it had finished by then is written.
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
for old in gpu.csv {tests,throughput,recipe}.log throughput.{json,png} trace.json{,.gz} recipe.json{,l}; do
  rm -f -- "$results/$old"
done
begun=$SECONDS
summary=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name: $*"
  # an interrupt, as from the keyboard: pytest then still lists what failed
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
  code=$?
  tail -n 25 "$results/$name.log" | cut -c1-300
  case $code in
    0) code=done ;;
    124 | 137) code="stopped after $limit s" ;;
    *) code="exit code $code" ;;
  esac
  summary+=("$name: $code, $((SECONDS - start)) s")
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv >"$results/gpu.csv" 2>&1
part tests 150 "$python" -m pytest -m gpu -v --tb=short --durations=10 -p no:cacheprovider \
  --continue-on-collection-errors
# compile last: max-autotune, its last setting, can take minutes
part throughput 210 "$python" benchmarks/throughput.py --json "$results/throughput.json" --repeats 5 --no-footprint \
  --profile "$results/trace.json" --picture "$results/throughput.png" \
  --ablate graph --ablate prefetch --ablate pipelines --ablate batch --ablate compile
part recipe 90 "$python" benchmarks/accuracy.py configs/onecycle.yaml --runs 2 "${data_words[@]}" \
  --finished "$results/recipe.jsonl" --json "$results/recipe.json"
gzip -f "$results/trace.json" 2>/dev/null

echo
echo "== summary ($((SECONDS - begun)) s)"
printf '%s\n' "${summary[@]}"
"$python" - "$results" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
path = folder / "throughput.json"
if path.exists():
    report = json.loads(path.read_text())
    for stage, rate in {**report["stages"], **report["peers"]}.items():
        print(f"{stage}: {rate['median']:,.0f} images/s")
    print("ratios:", json.dumps({k: round(v, 4) for k, v in report["ratios"].items()}))
    print("verdict:", report.get("verdict"), "; training's peak of GPU memory, GiB:", report.get("device_peak_gib"))
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
path = folder / "recipe.json"
if path.exists():
    report = json.loads(path.read_text())
    print("recipe:", json.dumps({k: report[k] for k in ("accuracy", "tta_accuracy", "seconds", "seconds_to_94")}))
PYTHON
