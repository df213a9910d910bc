"""Where a client may go: hostile addresses are refused before a connection is made."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from flowrl.errors import UserError
from flowrl.scoring import endpoints
from flowrl.scoring.client import ScoreClient
from flowrl.scoring.executors import CallFailed

HOSTILE = {
    # Written in ways that hide what they are.
    "http://169.254.169.254/latest/meta-data": "169.254.169.254",
    "http://[fe80::1]/": "fe80::1",
    "http://[::ffff:169.254.169.254]/": "::ffff:169.254.169.254",
    "http://[::ffff:10.0.0.1]/": "::ffff:10.0.0.1",
    "http://[64:ff9b::a9fe:a9fe]/": "64:ff9b::a9fe:a9fe",
    "http://[2002:a9fe:a9fe::]/": "2002:a9fe:a9fe::",
    "http://[2001:0:a9fe:a9fe::1]/": "2001:0:a9fe:a9fe::1",
    "http://[fd00:ec2::254]/": "fd00:ec2::254",
    "http://[::]/": "::",
    "http://2130706433/": "127.0.0.1",
    "http://0x7f000001/": "127.0.0.1",
    "http://0177.0.0.1/": "127.0.0.1",
    "http://127.1/": "127.0.0.1",
    "http://127.0.0.2/": "127.0.0.2",
    "http://0/": "0.0.0.0",
    "http://0.0.0.0/": "0.0.0.0",
    "http://10.1.2.3/": "10.1.2.3",
    "http://172.16.0.1/": "172.16.0.1",
    "http://192.168.1.1:8080/": "192.168.1.1",
    "http://100.64.0.1/": "100.64.0.1",
    "http://224.0.0.1/": "224.0.0.1",
    "http://240.0.0.1/": "240.0.0.1",
    "http://255.255.255.255/": "255.255.255.255",
    "http://198.18.0.1/": "198.18.0.1",
    # Names that point inside.
    "http://rebind.example.com/": "127.0.0.1",
    "http://metadata.google.internal/": "169.254.169.254",
    "https://scorer.example.com/": "10.0.0.5",
    "http://localhost/": "10.0.0.5",
    "http://localhost.localdomain/": "127.0.0.1",
}


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[Any]:
    """Every name resolves to ``addresses``; a connection is noted and refused."""
    tried: list[Any] = []

    def connect(address: Any, *rest: Any) -> None:
        tried.append(address)
        raise OSError("no network in tests")

    def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    monkeypatch.setattr(endpoints, "resolve", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


def outcome(url: str, *allow: str) -> str:
    with pytest.raises(CallFailed) as caught:
        ScoreClient("x", url, allow=allow).health(1.0)
    return str(caught.value)


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_addresses_are_refused_before_connecting(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = resolving(monkeypatch, HOSTILE[url])
    assert "not called: " in outcome(url)
    assert tried == []


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.2", "0", "169.254.169.254", "::1%lo", "10.0.0.1"],
)
def test_what_the_system_makes_of_numbers_is_refused_too(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the system's own reading of numeric hosts, where no name server is asked."""
    addresses = endpoints.resolve(host.partition("%")[0], 80)
    tried = resolving(monkeypatch, *addresses)
    assert "not called: " in outcome(f"http://{host}/") if ":" not in host else True
    assert tried == []


@pytest.mark.parametrize(
    ("url", "addresses", "allow", "ok"),
    [
        ("http://localhost:1/", ("127.0.0.1", "::1"), (), True),
        ("http://[::1]:1/", ("::1",), (), True),
        ("http://127.0.0.1:1/", ("127.0.0.1",), ("scorer.lab",), True),
        ("https://scorer.example.com/", ("93.184.215.14",), (), True),
        ("https://scorer.example.com/", ("2606:4700::6810:84e5",), (), True),
        ("http://gpu7/", ("10.9.0.7",), ("10.1.2.3/8",), True),
        ("https://scorer.example.com/", ("93.184.215.14",), ("other.example.com",), False),
        ("https://scorer.example.com/", ("93.184.215.14",), ("scorer.example.com",), True),
        ("https://SCORER.example.com./", ("93.184.215.14",), ("Scorer.Example.com",), True),
        ("https://scorer.example.com/", ("93.184.215.14",), ("scorer.example.com:443",), True),
        ("https://scorer.example.com/", ("93.184.215.14",), ("scorer.example.com:8443",), False),
        ("https://scorer.example.com/", ("93.184.215.14",), ("93.184.0.0/16",), True),
        # One bad address among good ones is enough.
        ("https://scorer.example.com/", ("93.184.215.14", "10.0.0.1"), (), False),
        ("http://gpu7/", ("10.0.0.7",), ("gpu7",), True),
        ("http://gpu7/", ("10.0.0.7",), ("10.0.0.0/8",), True),
        ("http://gpu7/", ("10.0.0.7",), ("10.0.0.7",), True),
        ("http://gpu7/", ("11.0.0.7",), ("10.0.0.0/8",), False),
        ("http://gpu7/", ("127.0.0.1",), ("gpu7",), True),
        # A listed name is no way to where clouds keep credentials; a listed network is.
        ("http://gpu7/", ("169.254.169.254",), ("gpu7",), False),
        ("http://gpu7/", ("0.0.0.0",), ("gpu7",), False),
        ("http://gpu7/", ("169.254.1.1",), ("169.254.0.0/16",), True),
        ("http://gpu7/", ("::ffff:169.254.1.1",), ("169.254.0.0/16",), True),
    ],
)
def test_the_list_decides(
    url: str, addresses: tuple[str, ...], allow: tuple[str, ...], ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = resolving(monkeypatch, *addresses)
    text = outcome(url, *allow)
    assert ("no network in tests" in text) is ok and bool(tried) is ok, text
    assert [address[0] for address in tried] == (list(addresses) if ok else [])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://a/", "use http:// or https://"),
        ("file:///etc/passwd", "use http:// or https://"),
        ("a.b:80", "use http:// or https://"),
        ("http://", "has no host"),
        ("http://user:secret@a/", "a user name or password"),
        ("http://127.0.0.1@evil.com/", "a user name or password"),
        ("http://a/?key=secret", "a query or fragment"),
        ("http://a/#b", "a query or fragment"),
        ("http://a:99999/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http://a b/", "characters that do not belong"),
        ("http://\u24d4xample.com/", "characters that do not belong"),
        ("http://a/x\ny", "characters that do not belong"),
    ],
)
def test_urls_are_checked(url: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        endpoints.parse(url, ())
    assert words in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("entry", ["http://a/", "10.0.0.0/99", "a b", "*", ""])
def test_the_list_is_checked(entry: str) -> None:
    with pytest.raises(UserError, match="is neither a host name nor a network"):
        endpoints.parse("http://a/", (entry,))


@pytest.mark.parametrize(
    ("url", "allow", "sent"),
    [
        ("http://93.184.215.14/", (), False),
        ("https://93.184.215.14/", (), True),
        ("http://93.184.215.14/", ("93.184.215.14",), True),
    ],
)
def test_a_token_needs_tls_or_a_listed_host(
    url: str, allow: tuple[str, ...], sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "x" * 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    monkeypatch.setattr(socket, "create_connection", lambda *_: ours)
    monkeypatch.setattr(endpoints, "resolve", lambda *_: ["93.184.215.14"])
    theirs.settimeout(2)
    with pytest.raises(CallFailed) as caught:
        ScoreClient("x", url, allow=allow, token_env="SCORER_TOKEN").health(0.1)
    assert ("a token is not sent without TLS" in str(caught.value)) is not sent
    assert bool(theirs.recv(1000)) is sent  # with TLS, the first bytes of its handshake
    theirs.close()
