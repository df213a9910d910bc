"""A service behind TLS: its certificate is checked, and deadlines hold in the handshake and after it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from flowrl.scoring.client import ScoreClient
from flowrl.scoring.executors import CallFailed

from .executor_tools import Answer, batch, read_request, scripted_server
from .test_executors import same
from .test_executors_http import GOOD, health


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a certificate of localhost that it signed itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make a certificate with")
    key, chain = (tmp_path_factory.mktemp("tls") / name for name in ("key.pem", "chain.pem"))
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
    return key, chain


def served(certificate: tuple[Path, Path], answer: Answer) -> Answer:
    """The answer behind TLS; the scripted server must not have read the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])

    def send(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            read_request(tls)
            answer(tls)

    return send


def silent(connection: socket.socket) -> None:
    time.sleep(1.0)


def test_a_certificate_nobody_signed_is_refused(certificate: tuple[Path, Path]) -> None:
    with scripted_server([served(certificate, health())], read=False) as (url, _):
        client = ScoreClient("x", url.replace("http://127.0.0.1", "https://localhost"))
        with pytest.raises(CallFailed, match="SSLCertVerificationError") as caught:
            client.health(2.0)
    assert not caught.value.retry


@pytest.mark.wall_clock
def test_a_trusted_service_scores_within_its_limit(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))
    answers = [served(certificate, answer) for answer in (health(), GOOD, silent)]
    with scripted_server(answers, read=False) as (url, _):
        client = ScoreClient("x", url.replace("http://127.0.0.1", "https://localhost"))
        assert client.health(2.0)["reward"] == "faulty"
        same(client.score(batch(1, 2), 2.0), 1.0, 2.0)
        start = time.perf_counter()
        with pytest.raises(CallFailed, match=r"no complete answer within 0\.3 s"):
            client.score(batch(1, 2), 0.3)
        assert time.perf_counter() - start < 0.8
        wrong = ScoreClient("x", url.replace("http:", "https:"))
        with pytest.raises(CallFailed, match="SSLCertVerificationError"):
            wrong.health(2.0)  # the certificate is of localhost, not of 127.0.0.1


@pytest.mark.wall_clock
def test_a_handshake_that_does_not_come_ends_in_time() -> None:
    with scripted_server([silent], read=False) as (url, _):
        start = time.perf_counter()
        with pytest.raises(CallFailed, match=r"no complete answer within 0\.3 s"):
            ScoreClient("x", url.replace("http:", "https:")).health(0.3)
        assert time.perf_counter() - start < 0.8
