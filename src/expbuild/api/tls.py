"""TLS: certificate and key from files, looked at before gRPC does, which says only that it did not like them."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import grpc

from expbuild.config import TlsConfig
from expbuild.errors import StartupError


def load_credentials(config: TlsConfig) -> grpc.ServerCredentials:
    """Read the files. Raises StartupError, naming the key of the configuration and what to do."""
    certificate = _certificates("certificate", config.certificate)
    key = _read("key", config.key)
    _check_key(config)
    client_ca = None if config.client_ca is None else _certificates("client_ca", config.client_ca)
    return grpc.ssl_server_credentials([(key, certificate)], client_ca, require_client_auth=client_ca is not None)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"tls.{key}: cannot read {path}: {error.strerror}") from error


def _certificates(key: str, path: Path) -> bytes:
    data = _read(key, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartupError(
            f"tls.{key}: {path} holds no usable certificate; expected PEM: -----BEGIN CERTIFICATE-----"
        ) from error
    return data


def _check_key(config: TlsConfig) -> None:
    path = config.key
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise StartupError(f"tls.key: others than its owner have rights to {path} (mode {mode:04o}): chmod 600 {path}")
    try:
        # The password is what keeps OpenSSL from asking the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.certificate, path, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartupError(f"tls.key: {path} is not the key of {config.certificate} (tls.certificate)") from error
        raise StartupError(
            f"tls.key: {path} holds no usable private key; expected PEM, not encrypted: -----BEGIN PRIVATE KEY-----"
        ) from error
