"""Ray on this machine with docker/ray/serve.yaml's application; prints its replicas' states as they change.

python -m tests.system.ray_driver PORT '{"max_replicas": 2}'
"""

from __future__ import annotations

import json
import signal
import sys
import time

import ray
import yaml
from ray import serve

from tests.system.support import DOCKER


def start_ray(attempts: int = 10) -> None:
    """Ray gives its processes 30 s to start, which a busy machine of two cores may exceed the first time."""
    for attempt in range(1, attempts + 1):
        try:
            ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20)
            return
        except Exception:  # Ray raises nothing narrower here
            if attempt == attempts:
                raise
            ray.shutdown()


def main(port: int, arguments: dict[str, object]) -> None:
    config = yaml.safe_load((DOCKER / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    application = config["applications"][0]
    module, _, name = application["import_path"].partition(":")
    builder = getattr(__import__(module, fromlist=[name]), name)
    start_ray()
    serve.start(http_options=config["http_options"] | {"host": "127.0.0.1", "port": port})
    serve.run(
        builder(application["args"] | arguments),
        name=application["name"],
        route_prefix=application["route_prefix"],
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    seen: dict[str, int] = {}
    try:
        while True:
            (deployment,) = serve.status().applications[application["name"]].deployments.values()
            states = {str(state): count for state, count in deployment.replica_states.items() if count}
            if states != seen:
                print(json.dumps(states), flush=True)
                seen = states
            time.sleep(0.25)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
