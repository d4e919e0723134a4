"""OpenVINO GenAI behind a pipe, for `benchmarks.peers`; for a Python that has openvino-genai alone.

    python openvino_worker.py MODEL THREADS STREAMS

MODEL is a GGUF file or an exported folder. Reads lines {"prompts": [...], "new_tokens": n} and answers
{"tokens": n, "seconds": s}.
"""

from __future__ import annotations

import json
import sys
import time

import openvino_genai


def main() -> None:
    model, threads, streams = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = streams
    scheduler.cache_size = 2  # GiB
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(
        model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=order["new_tokens"], ignore_eos=True, do_sample=False
        )
        start = time.perf_counter()
        result = pipeline.generate(order["prompts"], config)
        seconds = time.perf_counter() - start
        tokens = round(result.perf_metrics.get_num_generated_tokens())
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
