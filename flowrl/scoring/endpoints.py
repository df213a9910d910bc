"""Where a client may go: the address in a config is checked, and then what its host resolves to.

``allow`` lists host names (``scorer.lab``, ``scorer.lab:8443``) and networks (``10.0.0.0/8``, ``10.1.2.3``).

* This machine, written as localhost, 127.0.0.1 or [::1], is always allowed.
* With an empty list any public address is; with a list, only what is listed.
* Private and other special addresses must be listed; link-local ones, where clouds keep credentials, as a network.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from flowrl.errors import UserError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_HERE = ("localhost", "127.0.0.1", "::1")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Endpoint:
    """A checked URL. networks, names: what ``allow`` lists; listed: whether the host is among the names."""

    secure: bool
    host: str
    port: int
    path: str
    networks: tuple[_Network, ...]
    names: tuple[str, ...]

    @property
    def local(self) -> bool:
        """Whether the host is this machine, plainly written."""
        return self.host in _HERE

    @property
    def listed(self) -> bool:
        return self.host in self.names or f"{self.host}:{self.port}" in self.names

    def refusal(self, text: str) -> str:
        """Why an address that the host resolved to may not be reached, or "" where it may."""
        address = _unwrapped(text)
        if self.local:
            return "" if address.is_loopback else f"{self.host} resolves to {text}, which is another machine"
        if any(address.version == network.version and address in network for network in self.networks):
            return ""
        special = address.is_link_local or address.is_multicast or address.is_unspecified or _tunnelled(address)
        if self.listed:
            return f"{self.host} resolves to {text}, which only a listed network allows" if special else ""
        if self.networks or self.names:
            return f"neither {self.host} nor its address {text} is in allow"
        if special or not address.is_global:
            return f"{self.host} resolves to {text}, which is no public address; list it in allow if it is meant"
        return ""


def parse(url: str, allow: Sequence[str]) -> Endpoint:
    """Check a URL (http or https, a host, a path; no user, query or fragment) and a list. Raises UserError."""
    shown = f"executor: url {url!r}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"executor: the url is malformed: {error}") from error
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise UserError("executor: the url has a user name or password; put the token in the variable of token_env")
    if parts.query or parts.fragment:
        raise UserError("executor: the url has a query or fragment; give scheme, host, port and path only")
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{shown}: use http:// or https://")
    host = (parts.hostname or "").rstrip(".")
    if not host or not url.isascii() or any(not "!" <= char <= "~" for char in url):
        raise UserError(f"{shown}: has no host, or characters that do not belong there")
    networks, names = [], []
    for entry in allow:
        try:
            networks.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            if not _NAME.fullmatch(entry.lower()):
                raise UserError(f"executor: allow: {entry!r} is neither a host name nor a network") from None
            names.append(entry.lower())
    secure = parts.scheme == "https"
    standard = 443 if secure else 80
    return Endpoint(secure, host, port or standard, parts.path.rstrip("/"), tuple(networks), tuple(names))


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host, in the system's order. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def _unwrapped(text: str) -> _Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _tunnelled(address: _Address) -> bool:
    """Whether an IPv6 address stands for an IPv4 one that is not looked at here."""
    if isinstance(address, ipaddress.IPv4Address):
        return False
    return address.sixtofour is not None or address.teredo is not None or address in _NAT64
