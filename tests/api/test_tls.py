"""TLS: real servers with certificates of openssl's making, and what is wrong with files said before they serve."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from expbuild.api.tls import load_credentials
from expbuild.config import Config, TlsConfig, parse_config, render_config
from expbuild.errors import ConfigError, StartupError
from expbuild.reapi import CapabilitiesStub, GetCapabilitiesRequest
from expbuild.server import _exposure
from tests.api.client import TIMEOUT_S
from tests.api.conftest import StartServer
from tests.support.server import ReServer

pytestmark = pytest.mark.one_transport


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """What an authority has given out: to the server for 127.0.0.1, and to a client; and an authority nobody trusts."""

    ca: Pair
    server: Pair
    client: Pair
    stranger: Pair


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def _make(directory: Path, name: str, issuer: Pair | None = None) -> Pair:
    pair = Pair(directory / f"{name}.pem", directory / f"{name}.key")
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 2]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    by = [] if issuer is None else ["-CA", issuer.certificate, "-CAkey", issuer.key]
    kind = ["-addext", f"basicConstraints=critical,CA:{'TRUE' if issuer is None else 'FALSE'}"]
    _openssl(*new, *names, *by, *kind, "-out", pair.certificate, "-keyout", pair.key)
    pair.key.chmod(0o600)
    return pair


@pytest.fixture(scope="module")
def certificates(scratch: Path) -> Certificates:
    directory = scratch / "certificates"
    directory.mkdir()
    ca = _make(directory, "ca")
    return Certificates(
        ca, _make(directory, "server", ca), _make(directory, "client", ca), _make(directory, "stranger")
    )


def tls_table(certificates: Certificates, *, mutual: bool = False) -> dict[str, str]:
    table = {"certificate": str(certificates.server.certificate), "key": str(certificates.server.key)}
    return table | ({"client_ca": str(certificates.ca.certificate)} if mutual else {})


@pytest.fixture(scope="module")
def plain_tls(start_server: StartServer, certificates: Certificates) -> ReServer:
    return start_server("tls", tls=tls_table(certificates), server={"transport": "auto"})


@pytest.fixture(scope="module")
def mutual_tls(start_server: StartServer, certificates: Certificates) -> ReServer:
    return start_server("mtls", tls=tls_table(certificates, mutual=True), server={"transport": "auto"})


def call(address: str, trusted: Pair | None, own: Pair | None = None) -> str:
    """Ask for capabilities; return the status code. trusted: whose certificates the client believes; None: no TLS."""
    if trusted is None:
        channel = grpc.insecure_channel(address)
    else:
        key, chain = (own.key.read_bytes(), own.certificate.read_bytes()) if own else (None, None)
        credentials = grpc.ssl_channel_credentials(trusted.certificate.read_bytes(), key, chain)
        channel = grpc.secure_channel(address, credentials)
    with channel:
        stub: Any = CapabilitiesStub(channel)  # type: ignore[arg-type]  # the stubs say async
        try:
            stub.GetCapabilities(GetCapabilitiesRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            status: Any = error
            return str(status.code().name)
        return "OK"


# ---- over the wire ---------------------------------------------------------------------------------------------


def test_a_client_that_trusts_the_authority_is_served(plain_tls: ReServer, certificates: Certificates) -> None:
    assert call(plain_tls.address, certificates.ca) == "OK"


def test_without_tls_or_trust_no_call_gets_through(plain_tls: ReServer, certificates: Certificates) -> None:
    assert call(plain_tls.address, None) == "UNAVAILABLE"
    assert call(plain_tls.address, certificates.stranger) == "UNAVAILABLE"


def test_http2_is_agreed_on_by_alpn(plain_tls: ReServer, certificates: Certificates) -> None:
    """Clients in Go and Java refuse a server that does not answer "h2"; nothing older than TLS 1.2 is spoken."""
    context = ssl.create_default_context(cafile=str(certificates.ca.certificate))
    context.set_alpn_protocols(["http/1.1", "h2"])
    host, _, port = plain_tls.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        assert secured.selected_alpn_protocol() == "h2"
        assert secured.version() in ("TLSv1.2", "TLSv1.3")


def test_with_a_client_ca_only_clients_with_its_certificates_are_served(
    mutual_tls: ReServer, certificates: Certificates
) -> None:
    assert call(mutual_tls.address, certificates.ca, certificates.client) == "OK"
    assert call(mutual_tls.address, certificates.ca) == "UNAVAILABLE"
    assert call(mutual_tls.address, certificates.ca, certificates.stranger) == "UNAVAILABLE"


def test_auto_takes_the_transport_that_has_tls(plain_tls: ReServer) -> None:
    (selected,) = plain_tls.events("transport.selected")
    assert selected["transport"] == "grpcio"


# ---- files that cannot be used ---------------------------------------------------------------------------------


def refused(certificate: Path, key: Path, client_ca: Path | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        load_credentials(TlsConfig(certificate=certificate, key=key, client_ca=client_ca))
    return str(caught.value)


@pytest.mark.parametrize("missing", ["certificate", "key", "client_ca"])
def test_a_file_that_is_not_there_is_named(certificates: Certificates, missing: str) -> None:
    files = {
        "certificate": certificates.server.certificate,
        "key": certificates.server.key,
        "client_ca": certificates.ca.certificate,
        missing: Path("/nowhere.pem"),
    }
    assert refused(**files) == f"tls.{missing}: cannot read /nowhere.pem: No such file or directory"


def test_what_is_no_certificate_is_refused(certificates: Certificates) -> None:
    """A key in its place, also for the authority of clients."""
    key = certificates.server.key
    reason = f"{key} holds no usable certificate; expected PEM: -----BEGIN CERTIFICATE-----"
    assert refused(key, key) == f"tls.certificate: {reason}"
    assert refused(certificates.server.certificate, key, key) == f"tls.client_ca: {reason}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_have_rights_to_is_refused(certificates: Certificates, tmp_path: Path, mode: int) -> None:
    key = tmp_path / "server.key"
    key.write_bytes(certificates.server.key.read_bytes())
    key.chmod(mode)
    assert refused(certificates.server.certificate, key) == (
        f"tls.key: others than its owner have rights to {key} (mode {mode:04o}): chmod 600 {key}"
    )


def test_a_key_of_another_certificate_is_refused(certificates: Certificates) -> None:
    certificate, key = certificates.server.certificate, certificates.client.key
    assert refused(certificate, key) == f"tls.key: {key} is not the key of {certificate} (tls.certificate)"


def test_a_key_that_is_none_or_encrypted_is_refused_without_asking_for_a_password(
    certificates: Certificates, tmp_path: Path
) -> None:
    key = tmp_path / "server.key"
    reason = f"tls.key: {key} holds no usable private key; expected PEM, not encrypted: -----BEGIN PRIVATE KEY-----"
    key.touch(0o600)
    assert refused(certificates.server.certificate, key) == reason
    _openssl("pkcs8", "-topk8", "-in", certificates.server.key, "-out", key, "-passout", "pass:secret")
    key.chmod(0o600)
    assert refused(certificates.server.certificate, key) == reason


def test_the_server_says_so_in_one_line_and_exits_1(certificates: Certificates, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "[server]\naddress = '127.0.0.1:0'\n"
        f"[tls]\ncertificate = '{certificates.server.certificate}'\nkey = '/no.key'\n"
        "[storage.cas]\nbackend = 'memory'\n[storage.action_cache]\nbackend = 'memory'\n"
        "[capabilities]\nexec_enabled = false\n"
    )
    command = [sys.executable, "-m", "expbuild", "--config", str(config)]
    env = {**os.environ, "EXPBUILD_LOG": "error"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (
        1,
        "re-server: tls.key: cannot read /no.key: No such file or directory\n",
    )


# ---- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        pytest.param(
            "[tls]",
            [
                "tls.certificate: expected an absolute path, got nothing",
                "tls.key: expected an absolute path, got nothing",
            ],
            id="empty-tls",
        ),
        pytest.param(
            "[tls]\ncertificate = 'c.pem'\nkey = 5\nca = '/ca.pem'",
            [
                'tls.certificate: expected an absolute path, got "c.pem"',
                "tls.key: expected an absolute path, got 5",
                "tls.ca: unknown key; known here: certificate, key, client_ca",
            ],
            id="tls",
        ),
        pytest.param("tls = true", ["tls: expected a table, got true"], id="no-table"),
        pytest.param("[auth]", ["auth.tokens_file: expected an absolute path, got nothing"], id="empty-auth"),
        pytest.param(
            "[auth]\ntokens_file = '/t'\ntoken_file = '/t'",
            ['auth.token_file: unknown key; did you mean "tokens_file"?'],
            id="auth",
        ),
    ],
)
def test_the_tables_are_read_strictly(text: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.toml")
    assert list(caught.value.problems) == problems


CERTIFICATE = "[tls]\ncertificate = '/c.pem'\nkey = '/c.key'\n"
MUTUAL = f"{CERTIFICATE}client_ca = '/ca.pem'\n"
TOKENS = "[auth]\ntokens_file = '/tokens'\n"


def test_the_tables_read_back_as_rendered() -> None:
    config = parse_config(MUTUAL + TOKENS, "test.toml")
    assert parse_config(render_config(config), "rendered") == config
    assert "[tls]" not in render_config(Config())


@pytest.mark.parametrize(
    ("host", "tables", "expected"),
    [
        ("127.0.0.1", "", None),
        ("0.0.0.0", "", "run commands here: there is no TLS and no authentication"),
        ("0.0.0.0", "[capabilities]\nexec_enabled = false", "change what is cached here: there is no TLS and no auth"),
        ("0.0.0.0", CERTIFICATE, "run commands here: there is no authentication"),
        ("0.0.0.0", TOKENS, "tokens and files travel in the clear, for anybody on the way to read: there is no TLS"),
        ("0.0.0.0", CERTIFICATE + TOKENS, None),
        ("0.0.0.0", MUTUAL, None),
    ],
)
def test_a_public_address_is_warned_about_when_something_is_missing(
    host: str, tables: str, expected: str | None
) -> None:
    """And only then, with what is missing."""
    reason = _exposure(parse_config(f"[server]\naddress = '{host}:0'\n{tables}", "test.toml"))
    assert reason == expected if expected is None else expected in str(reason)
