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
[ ! -e "$output" ] || fail "--output $output exists; give a new folder"
base=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["base"])' "$adapter/medqlora.json")
trap '[ -e "$output/adapter.jsonl" ] || rm -rf "$output"' EXIT # without any answers, the same command can be run again
mkdir -p "$output"

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
