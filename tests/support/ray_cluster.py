"""A Ray cluster of two nodes on this machine, as a process that takes orders on its stdin.

It prints its address and its client server's, then obeys: "kill node", "kill head". It ends with
its stdin.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

MEMORY = 100 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback only
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": MEMORY}
    port = free_port()
    head = {**node, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(**node)
    print(cluster.address, f"ray://127.0.0.1:{port}", flush=True)
    for order in sys.stdin:
        killed = {"kill node": second, "kill head": cluster.head_node}[order.strip()]
        killed.kill_all_processes(check_alive=False, allow_graceful=False)
    cluster.shutdown()


if __name__ == "__main__":
    main()
