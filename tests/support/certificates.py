"""Certificates of the tests, signed by themselves, and the contexts of clients that trust them."""

import ssl
import subprocess
from pathlib import Path

from tests.support.external_programs import program


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate of localhost and 127.0.0.1, and return its path and its key's."""
    certificate, key = folder / "fullchain.pem", folder / "privkey.pem"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = [program("openssl"), "req", "-x509", "-days", "1", *made, "-out", str(certificate), *names]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def trusting(certificate: Path | None) -> ssl.SSLContext:
    """The context of a client that trusts this certificate and no other."""
    return ssl.create_default_context(cafile=certificate)
