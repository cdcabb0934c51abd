#!/usr/bin/env bash
# The recipes of configs/ on a GPU, 20 seeds each, the fastest first. It ends after 20 minutes; the runs that are finished by
# then are kept, and started again with the same RESULTS it goes on with the seeds that are missing.
#   bash benchmarks/gpu_recipes.sh RESULTS DATA [PYTHON]
# RESULTS receives RECIPE.json and RECIPE.jsonl, as benchmarks/accuracy.py writes them; DATA is what data.root takes.
set -uo pipefail
results=${1:?usage: gpu_recipes.sh RESULTS DATA [PYTHON]}
data=${2:?usage: gpu_recipes.sh RESULTS DATA [PYTHON]}
python=${3:-python3}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 1
data=$(cd "$data" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
limit=1200 code=0

for recipe in fast94 fast95 onecycle accurate96; do
  left=$((limit - SECONDS))
  if [ "$left" -le 0 ]; then
    echo "== $recipe: no time left" && code=1
    continue
  fi
  echo "== $recipe"
  timeout --signal=INT --kill-after=20 "$left" "$python" benchmarks/accuracy.py "configs/$recipe.yaml" --runs 20 \
    train.device=cuda data.root="$data" data.download=false run.analyse=false \
    --finished "$results/$recipe.jsonl" --json "$results/$recipe.json" >"$results/$recipe.log" 2>&1 || code=1
  tail -n 15 "$results/$recipe.log" | cut -c1-300
done
exit $code
