"""Process groups that span nodes use the network that the nodes' Ray uses."""

import os
from collections.abc import Mapping
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeTorchConfig(TorchConfig):
    """Ray Train's process group, made on the network interface of each node's Ray address.

    Without being told, gloo asks for the address of the machine's host name, and takes loopback when that has none:
    workers on different nodes then wait for each other until they give up. A ``GLOO_SOCKET_IFNAME`` that is set stays.
    """

    @property
    def backend_cls(self) -> type:
        return _OnNodeNetwork


class _OnNodeNetwork(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Let gloo use the interface of this node's Ray address, unless it was told which."""
    name = interface_of(ray.util.get_node_ip_address(), _interfaces())
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str, interfaces: Mapping[str, list[str]]) -> str | None:
    """Name of the interface, among the addresses of each, that has ``address``; None when none does."""
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def _interfaces() -> dict[str, list[str]]:
    return {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
