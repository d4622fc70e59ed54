#!/usr/bin/env bash
# Restore a fine-tuned model: see what limits of safety KL keep, and restore.
#
#   examples/restore.sh ALIGNED FINETUNED OUTPUT
#
# ALIGNED and FINETUNED are folders or Hub ids; FINETUNED may be a LoRA adapter folder.
set -euo pipefail

if [ $# -ne 3 ]; then
  echo "usage: $0 ALIGNED FINETUNED OUTPUT" >&2
  exit 2
fi
aligned=$1 finetuned=$2 output=$3

# Do the two fit together? Exit code 1 and a list if not; nothing is written.
deltaguard restore "$aligned" "$finetuned" -o "$output/restored" --dry-run

# Once per aligned model. `--resume` also accepts a store that is finished.
deltaguard calibrate "$aligned" -o "$output/store" --resume

# What do limits keep? No model is written, only numbers and a page with a plot. With `--utility FILE` they say
# what your task keeps: JSON lines with `prompt` and `response` that were not trained on.
deltaguard sweep "$aligned" "$finetuned" -o "$output/sweep" --store "$output/store"

# Keeps as much as adds at most 2 points to the aligned model's attack success, by asking it and the candidates.
# `--max-safety-kl LIMIT` holds to a safety KL in nats per response token instead, without asking.
deltaguard restore "$aligned" "$finetuned" -o "$output/restored" --store "$output/store"
deltaguard verify "$output/restored"

echo "Now ask $output/restored harmful requests and run your task's evaluation on it."
echo "$output/sweep/report.html shows what other limits keep."
