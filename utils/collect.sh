#!/usr/bin/env bash
# One cell from nothing to a verified collection: pretrain if it is missing, finetune, verify. `make collect` runs it.
#   DATASET=ARC-c RANK=8 [MODEL=..] [KEEP=..] [SEED=..] [FORCE=1] [DEVICES=..] bash utils/collect.sh
# What is complete is not done again; after a crash it goes on where it was.
set -euo pipefail

utils=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
make --no-print-directory -C "$utils/.." setup
python="$utils/../.venv/bin/python"
rank=${RANK:-8}
seed=(${SEED:+"seed=$SEED"})
keep=(${KEEP:+"save_total_limit=$KEEP"})

pretrain=$("$python" "$utils/cells.py" pretrain)
finetune=$("$python" "$utils/cells.py" finetune)

# A complete collection needs no pretrain folder any more. Status 3: there is something to do.
status=0
"$python" "$utils/train.py" --check "$finetune" "$rank" "${seed[@]}" "${keep[@]}" >/dev/null || status=$?
if [ "$status" -ne 0 ] && [ "$status" -ne 3 ]; then
    exit "$status"
fi
if [ "$status" -eq 3 ] || [ -n "${FORCE:-}" ]; then
    bash "$utils/train_with_rank.sh" "$pretrain" "$rank" "${seed[@]}"
    bash "$utils/train_with_rank.sh" "$finetune" "$rank" "${seed[@]}" "${keep[@]}"
fi
exec "$python" "$utils/verify.py" --recipe "$finetune" "$rank" "${seed[@]}" "${keep[@]}"
