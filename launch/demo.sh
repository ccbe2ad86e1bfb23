#!/usr/bin/env bash
# Run the whole job on the embedded demonstration: score the base, fine-tune it with QLoRA, score the tuned model, merge the
# adapter, and score the merged model.
#   bash launch/demo.sh [OUTPUT_DIR]        OUTPUT_DIR is the run folder; default runs/demo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/install.sh
. launch/install.sh
install_medqlora "" || exit $?

output=${1:-runs/demo}
if [ -e "$output" ]; then
    echo "$output exists; remove it or name another folder: bash launch/demo.sh OUTPUT_DIR" >&2
    exit 2
fi
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    recipes/sft_qlora.py --output_dir "$output"
python recipes/merge_adapter.py --adapter "$output/adapter" --output "$output/merged"
python eval/predict.py --model "$output/merged" --format medmcqa --path recipes/demo/data/test.jsonl \
    --output "$output/predictions/merged.jsonl"
python eval/score.py "$output/predictions/merged.jsonl"
echo "this is a demonstration and not a medical model; all files that it wrote are in $output"
if [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ]; then
    echo "for the next commands of README.md, enter the environment first: . .venv/bin/activate"
fi
