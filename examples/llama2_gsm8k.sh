#!/usr/bin/env bash
# Restore a public fine-tune of Llama-2-7B-chat on GSM8K, and measure it. See llama2_gsm8k.md; it needs a GPU.
#
#   examples/llama2_gsm8k.sh OUTPUT [MODEL ...]
#
# MODELs are measured beside aligned, fine-tuned and restored: what others made of the same pair.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 OUTPUT [MODEL ...]" >&2
  exit 2
fi
output=$1
shift
suite=$(dirname "$0")/llama2_gsm8k.yaml
aligned=kmseong/llama2_7b-chat-Safety-FT-lr5e-5
finetuned=kmseong/llama2_7b-chat_gsm8k_full_ft_lr5e-5

# Do the two fit together? Exit code 1 and a list if not; nothing is written.
deltaguard restore "$aligned" "$finetuned" -o "$output/planned" --dry-run

# Once for all fine-tunes of this aligned model.
deltaguard calibrate "$aligned" -o "$output/store" --resume

# Does the fine-tune need a restore? Exit code 3 says so, and is what is expected here.
deltaguard check "$aligned" "$finetuned" --store "$output/store" || [ $? -eq 3 ]

# What do limits keep?
deltaguard sweep "$aligned" "$finetuned" -o "$output/sweep" --store "$output/store"

# At most 2 points of attack success over the aligned model's, by asking; and held to a safety KL alone.
deltaguard restore "$aligned" "$finetuned" -o "$output/restored" --store "$output/store" --resume
deltaguard restore "$aligned" "$finetuned" -o "$output/restored-by-kl" --store "$output/store" --max-safety-kl 0.0006 --resume
deltaguard verify "$output/restored"
deltaguard verify "$output/restored-by-kl"

# An interrupted evaluation goes on with the same command.
deltaguard eval "$aligned" "$finetuned" "$output/restored" "$output/restored-by-kl" "$@" -o "$output/evaluation" --suite "$suite" --device cuda
deltaguard report "$output/evaluation"
