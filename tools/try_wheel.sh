#!/usr/bin/env bash
# Tries a wheel as a stranger gets it, without extras and away from this source: into an environment that is
# made for it and goes afterwards. Writes what it found itself beside as an SBOM.
#
#   tools/try_wheel.sh WHEEL PYTHON SBOM
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$(dirname "$3")"
wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
sbom=$(cd "$(dirname "$3")" && pwd)/$(basename "$3")
python=$2
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH

"$python" -m venv "$place/env"
PATH="$place/env/bin:$PATH"
pip install --quiet "$wheel"
cd "$place"
deltaguard info
python - "$source/tests" <<'PAIR'
import sys

sys.path.insert(0, sys.argv[1])
import deltaguard, models

assert "site-packages" in deltaguard.__file__, deltaguard.__file__
model = models.tiny_model("llama")
models.save(model, "aligned")
models.save(models.perturbed(model, 0.05), "finetuned")
PAIR
deltaguard calibrate aligned -o store --num-samples 8 --device cpu
deltaguard restore aligned finetuned -o restored --store store --max-safety-kl 0.001 --device cpu
deltaguard verify restored

cyclonedx-py environment --pyproject "$source/pyproject.toml" --output-reproducible -o "$sbom" env/bin/python

pip uninstall --quiet --yes deltaguard
if [ -e env/bin/deltaguard ] || python -c "import deltaguard" 2>/dev/null; then
  echo "Something of deltaguard stays behind once it is uninstalled." >&2
  exit 1
fi
echo "$(basename "$wheel") works with $(python --version)"
