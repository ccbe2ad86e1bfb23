#!/usr/bin/env bash
# Check that the merged model is the model that was trained. The adapter on its quantized base, both kinds of merged model, and with
# --vllm also vLLM answer the same questions. The script fails with exit code 1 if one of them answers too many questions differently
# from the adapter.
#   bash launch/merge_gate.sh --adapter DIR --format NAME --path FILE --output DIR
#       [--limit N] [--max_disagreement 0.02] [--max_disagreement_original 0.10] [--vllm]
# --max_disagreement is the largest fraction of questions with different answers. The merge into the original weights has a bound of
# its own, because the adapter was trained on the quantized base and that merge is therefore a different model.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bound=0.02 original_bound=0.10 adapter="" format="" path="" output="" vllm="" limit=()
read_base='
import sys
from pathlib import Path
from medqlora.core.command import run_early
from medqlora.core.errors import RunError
from medqlora.core.reading import read_object
def read():
    base = read_object(Path(sys.argv[1]), "--adapter").get("base")
    if not isinstance(base, str):
        raise RunError(f"--adapter: medqlora.json names no base, got {base!r}; restore the file")
    return base
print(run_early(read))'
fail() { echo "merge_gate.sh: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
    [ "$1" = --vllm ] || [ $# -gt 1 ] || fail "$1 needs a value"
    case $1 in
        --adapter) adapter=$2 ;;
        --format) format=$2 ;;
        --path) path=$2 ;;
        --output) output=$2 ;;
        --limit) limit=(--limit "$2") ;;
        --max_disagreement) bound=$2 ;;
        --max_disagreement_original) original_bound=$2 ;;
        --vllm) vllm=yes; shift; continue ;;
        *) fail "unknown argument $1; see the head of this file" ;;
    esac
    shift 2
done
for name in adapter format path output; do
    [ -n "${!name}" ] || fail "--$name is missing; see the head of this file"
done
[ -f "$adapter/medqlora.json" ] || fail "--adapter $adapter has no medqlora.json; give the adapter folder of a run"
for value in "$bound" "$original_bound"; do # NaN and infinite bounds would let everything pass
    [[ $value =~ ^(0?\.[0-9]+|[01](\.0*)?)$ ]] || fail "a bound is a fraction from 0 to 1, as 0.02; got $value"
done
if [ -e "$output" ] || [ -L "$output" ]; then fail "--output $output exists; give a new folder"; fi
base=$(python -c "$read_base" "$adapter/medqlora.json") || exit 2
mkdir -p "$(dirname "$output")"
mkdir "$output" || fail "--output $output cannot be made; give a new folder"
# Without any answers, the same command can be run again. The folder was made here, so nobody else's files are removed.
trap '[ -e "$output/adapter.jsonl" ] || rm -rf "$output"' EXIT

for weights in dequantized original; do
    python "$root/recipes/merge_adapter.py" --adapter "$adapter" --base "$base" --base_weights "$weights" --output "$output/$weights" --verify false
done
predict() { # NAME MODEL [FURTHER ARGUMENTS]
    python "$root/eval/predict.py" --model "$2" --format "$format" --path "$path" "${limit[@]}" --output "$output/$1.jsonl" "${@:3}"
}
predict adapter "$base" --adapter "$adapter"
predict dequantized "$output/dequantized"
predict original "$output/original"
others=("$output/dequantized.jsonl")
if [ -n "$vllm" ]; then
    predict vllm "$output/dequantized" --engine vllm
    others+=("$output/vllm.jsonl")
fi
status=0
python "$root/eval/compare.py" "$output/adapter.jsonl" "${others[@]}" --max_disagreement "$bound" || status=$?
python "$root/eval/compare.py" "$output/adapter.jsonl" "$output/original.jsonl" --max_disagreement "$original_bound" || status=$?
exit "$status"
