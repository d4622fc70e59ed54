#!/usr/bin/env bash
# Restore a fine-tuned model and compare three strengths.
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

# Once per aligned model: the only step that runs it. `--resume` also accepts a store that is finished.
deltaguard calibrate "$aligned" -o "$output/store" --resume

for strength in 0.03 0.1 0.3; do
  restored="$output/restored-$strength"
  deltaguard restore "$aligned" "$finetuned" -o "$restored" --store "$output/store" \
    --strength "$strength" --json > "$output/report-$strength.json"
  deltaguard verify "$restored"
done

echo "Now ask $output/restored-* harmful requests, run your task's evaluation on them, and keep one."
