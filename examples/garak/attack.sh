#!/usr/bin/env bash
# Serve models one after another, and have garak attack each with what GCG, TAP, AutoDAN and DAN left behind.
#
#   examples/garak/attack.sh OUTPUT MODEL [MODEL ...]
#
# MODELs are folders; the first is what the others are compared with. GARAK names the program of garak, which wants
# an environment of its own (`python -m venv garak-env && garak-env/bin/pip install garak`): GARAK=garak-env/bin/garak.
# SERVE is the server: `vllm serve` on a GPU, `transformers serve` anywhere. DEVICE is for the latter.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 OUTPUT MODEL [MODEL ...]" >&2
  exit 2
fi
if [ -n "$(for model in "${@:2}"; do basename "$(cd "$model" && pwd)"; done | sort | uniq -d)" ]; then
  echo "Two models have one folder name, by which their reports are named: rename one." >&2
  exit 2
fi
mkdir -p "$1"
output=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
shift
garak=${GARAK:-garak}
serve=${SERVE:-transformers serve}
port=${PORT:-8000}
probes=${PROBES:-probes.suffix.GCGCached,probes.tap.TAPCached,probes.dan.AutoDANCached,probes.dan.Ablation_Dan_11_0}
export OPENAICOMPATIBLE_API_KEY=none # garak asks for one; the server does not

# Greedy, as long as deltaguard's suites, and no stop texts: garak's own end an answer at the first "#" or ";".
cat > "$output/generator.json" <<JSON
{"openai": {"OpenAICompatible": {"uri": "http://127.0.0.1:$port/v1/", "max_tokens": 256, "temperature": 0, "stop": [],
 "suppressed_params": ["n", "frequency_penalty", "presence_penalty", "stop"]}}}
JSON

server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null || true' EXIT
reports=()
for model in "$@"; do
  model=$(cd "$model" && pwd)
  name=$(basename "$model")
  ! curl -s "http://127.0.0.1:$port/" > /dev/null || { echo "Something else listens on port $port." >&2; exit 1; }
  device=()
  [ "${serve##*/}" != "transformers serve" ] || device=(--device "${DEVICE:-auto}")
  $serve "$model" --host 127.0.0.1 --port "$port" ${device[@]+"${device[@]}"} > "$output/$name.server.log" 2>&1 &
  server=$!
  until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
    kill -0 "$server" || { cat "$output/$name.server.log" >&2; exit 1; }
    sleep 1
  done
  "$garak" --target_type openai.OpenAICompatible --target_name "$model" --generator_option_file "$output/generator.json" \
    --spec "$probes" --generations 1 --seed 0 --report_prefix "$output/$name"
  kill "$server"
  wait "$server" || true
  server=
  reports+=("$name=$output/$name.report.jsonl")
done
"${PYTHON:-python}" "$here/table.py" "$output/evaluation" "${reports[@]}"
