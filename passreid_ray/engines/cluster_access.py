"""Who can reach a cluster, and whether it asks them for a token: the ports of a node run what they are sent."""

import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal

import grpc
import psutil
from ray._common.tls_utils import load_certs_from_env
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

from passreid_ray.errors import UserError

Reach = Literal["this machine", "private network", "internet"]
"""From where an address can be reached."""

TOKEN_MODE = "token"
MODE_VARIABLE = "RAY_AUTH_MODE"
PRIVATE_NETWORKS = tuple(
    ip_network(network)
    for network in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598
        *("169.254.0.0/16", "fe80::/10"),  # link-local
        "fc00::/7",  # unique local, RFC 4193
    )
)
IS_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A question to the head that changes nothing; its empty form is valid."""
TLS_VARIABLES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
ADVICE = (
    "make a token with ray get-auth-token --generate, bring it to ~/.ray/auth_token (mode 0600) of every node, and "
    f"start each with {MODE_VARIABLE}=token"
)


def reach_of(address: str) -> Reach:
    """From where the IP address ``address`` can be reached.

    What is neither loopback nor of a private network counts as the internet; private are RFC 1918, link-local, unique
    local and carrier-grade NAT. Raises ``ValueError`` for a text that is no IP address.
    """
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback or ip.is_unspecified:
        return "this machine"
    return "private network" if any(ip in network for network in PRIVATE_NETWORKS) else "internet"


def ip_addresses(host: str) -> list[str]:
    """IP addresses of ``host``; raises ``OSError`` for a name that nobody knows."""
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


def most_exposed(addresses: Iterable[str]) -> tuple[str, Reach]:
    """Of ``addresses`` the one that the most can reach."""
    order: tuple[Reach, ...] = ("this machine", "private network", "internet")
    reached: list[tuple[str, Reach]] = [(address, reach_of(address)) for address in addresses]
    return max(reached, key=lambda found: order.index(found[1]))


def own_addresses() -> list[str]:
    """IP addresses of this machine's network interfaces that are up."""
    is_up = {name: stats.isup for name, stats in psutil.net_if_stats().items()}
    return [
        own.address
        for name, addresses in psutil.net_if_addrs().items()
        for own in addresses
        if is_up.get(name) and own.family in (socket.AF_INET, socket.AF_INET6)
    ]


def exposed_addresses(announced: Iterable[str]) -> list[str]:
    """Where nodes can be reached that announce the addresses ``announced``.

    Ray's ports are open on every interface of a node, whatever it announces: if one of the nodes is this machine, all
    addresses of this machine count.
    """
    announced, own = list(announced), own_addresses()
    is_here = any(address in own or reach_of(address) == "this machine" for address in announced)
    return [*announced, *(own if is_here else ())]


def check_local_start() -> None:
    """Raise ``UserError`` when a local cluster would run without token authentication within reach of others."""
    mode = os.environ.get(MODE_VARIABLE)
    if mode is None or mode.lower() == TOKEN_MODE:
        return
    address, reach = most_exposed(["127.0.0.1", *own_addresses()])
    if reach != "this machine":
        raise UserError(
            f"{MODE_VARIABLE}={mode}: whoever reaches this machine, at {address} for one, could run programs on "
            f"it, since Ray's ports are open on every network interface; unset {MODE_VARIABLE} to start with a token"
        )


def head_asks_for_token(host: str, port: int, *, timeout_seconds: float) -> bool:
    """Whether the head at ``host`` and ``port`` asks for a token; if so this process has turned its own on.

    The token is Ray's: ``RAY_AUTH_TOKEN``, the file of ``RAY_AUTH_TOKEN_PATH``, or ~/.ray/auth_token. Raises
    ``UserError`` when the head asks for one and there is none or another is expected, and when no head answers, or
    answers once only; the former is also so where one side speaks TLS and the other does not.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    match _answer(where, (), timeout_seconds):
        case grpc.StatusCode.OK:
            return False
        case grpc.StatusCode.UNAUTHENTICATED:
            _check_token(where, timeout_seconds)
            return True
        case status:
            found = "with TLS (RAY_USE_TLS=1)" if _uses_tls() else "without TLS"
            raise UserError(
                f"RAY_ADDRESS: no head of a cluster answers at {where} {found} ({status.name}); give the port that ray "
                f"start printed, and {', '.join(TLS_VARIABLES)} as its nodes have them"
            )


def check_open_cluster(addresses: Iterable[str], where: str) -> str | None:
    """A warning, in a line, for the cluster at ``where`` that asks for no token and whose nodes have ``addresses``.

    None when only this machine reaches it. Raises ``UserError`` when the internet does.
    """
    address, reach = most_exposed(exposed_addresses(addresses))
    if reach == "this machine":
        return None
    if reach == "internet":
        raise UserError(
            f"RAY_ADDRESS: the cluster at {where} asks for no token and has the public address {address}: anybody can "
            f"run programs on it. This job does not; {ADVICE}"
        )
    return (
        f"warning: the cluster at {where} asks for no token: whoever reaches {address} can run programs on its nodes; "
        f"{ADVICE}"
    )


def _check_token(where: str, timeout_seconds: float) -> None:
    # Ray itself turns the token on only for a cluster that it finds by itself, never for an address that was given.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    if not is_token_auth_enabled():
        mode = os.environ.get(MODE_VARIABLE)
        found = f"{MODE_VARIABLE}={mode}" if mode is not None else "there is none here"
        raise UserError(
            f"RAY_ADDRESS: the head at {where} asks for a token, but {found}; bring the cluster's to ~/.ray/auth_token "
            f"(mode 0600), or name its file in RAY_AUTH_TOKEN_PATH, and set {MODE_VARIABLE}=token"
        )
    metadata = tuple((name.lower(), value) for name, value in get_auth_headers_if_auth_enabled({}).items())
    match _answer(where, metadata, timeout_seconds):
        case grpc.StatusCode.OK:
            return
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            raise UserError(
                f"RAY_ADDRESS: the head at {where} refuses the token of this user; bring the cluster's to "
                "~/.ray/auth_token (mode 0600), or name its file in RAY_AUTH_TOKEN_PATH"
            )
        case status:
            raise UserError(
                f"RAY_ADDRESS: the head at {where} asked for a token and then did not answer ({status.name}): it may "
                "be busy or restarting; try again, and look at it with ray status when that does not help"
            )


def _answer(where: str, metadata: tuple[tuple[str, str], ...], timeout_seconds: float) -> grpc.StatusCode:
    """How the head at ``where`` answers a harmless question."""
    # Not Ray's own channel, which would send the token to whoever listens there, asked or not.
    with _channel(where) as channel:
        ask = channel.unary_unary(IS_ALIVE)
        try:
            ask(b"", timeout=timeout_seconds, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _channel(where: str) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]  # as Ray's own
    if not _uses_tls():
        return grpc.insecure_channel(where, options)
    try:
        certificate, key, authority = load_certs_from_env()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"RAY_USE_TLS: the certificates cannot be read: {error}; set {', '.join(TLS_VARIABLES)}"
        ) from None
    return grpc.secure_channel(where, grpc.ssl_channel_credentials(authority, key, certificate), options)


def _uses_tls() -> bool:
    return os.environ.get(TLS_VARIABLES[0], "0").lower() in ("1", "true")
