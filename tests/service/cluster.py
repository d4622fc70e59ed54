"""A Ray cluster of three machines that are processes of this one: a head that takes no jobs, two workers.

`python cluster.py` prints the address of its Jobs API, and ends when its standard input does.
"""

import sys
import time

from ray._private import services
from ray.cluster_utils import Cluster

# A machine that is busy with other tests is not dead.
PATIENT = {"health_check_failure_threshold": 100}
SMALL = {"object_store_memory": 80_000_000}


def patiently(find, seconds=600):
    """Look for a machine of the cluster for longer than the half minute in which Ray expects it."""

    def look(*args, **kwargs):
        until = time.monotonic() + seconds
        while True:
            try:
                return find(*args, **kwargs)
            except RuntimeError:
                if time.monotonic() > until:
                    raise

    return look


def main():
    services.get_node = patiently(services.get_node)
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
    cluster = Cluster(
        initialize_head=True,
        # Any free port: another cluster on this machine may have the usual one.
        head_node_args={
            "num_cpus": 0,
            "dashboard_agent_listen_port": 0,
            "_system_config": PATIENT,
            **dashboard,
            **SMALL,
        },
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, **SMALL)
    sys.stdout.write(f"http://{cluster.head_node.webui_url}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
