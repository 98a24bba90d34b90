import os

import pytest

from passreid_ray.train import node_network
from passreid_ray.train.node_network import GLOO_INTERFACE, interface_of, use_node_interface

INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.7"], "eth1": ["10.0.0.7", "10.0.1.7"]}


@pytest.mark.parametrize(("address", "name"), [("10.0.1.7", "eth1"), ("127.0.0.1", "lo"), ("10.0.0.8", None)])
def test_the_interface_is_the_one_that_has_the_address(address: str, name: str | None) -> None:
    assert interface_of(address, INTERFACES) == name


@pytest.mark.parametrize(("told", "address", "used"), [(None, "10.0.0.7", "eth1"), ("eth0", "10.0.0.7", "eth0")])
def test_gloo_uses_the_interface_of_the_nodes_address_unless_told_which(
    monkeypatch: pytest.MonkeyPatch, told: str | None, address: str, used: str
) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.setattr(node_network, "_interfaces", lambda: INTERFACES)
    monkeypatch.setenv(GLOO_INTERFACE, told or "")
    if told is None:
        monkeypatch.delenv(GLOO_INTERFACE)
    use_node_interface()
    assert os.environ[GLOO_INTERFACE] == used


def test_an_address_that_no_interface_has_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.2")
    monkeypatch.setattr(node_network, "_interfaces", lambda: INTERFACES)
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    use_node_interface()
    assert GLOO_INTERFACE not in os.environ
