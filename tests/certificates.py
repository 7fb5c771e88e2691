"""Authorities and certificates for tests, made by the command `openssl`."""

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from quiver.config import TlsConfig

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path

    def settings(self, **more: object) -> TlsConfig:
        """Return the settings of a server that shows it."""
        return TlsConfig(tls_cert=self.cert, tls_key=self.key, **more)

    def arguments(self) -> dict[str, object]:
        """Return the same for a stub."""
        return {"tls_cert": self.cert, "tls_key": self.key}

    def der(self) -> bytes:
        """Return what a client sees of it."""
        return ssl.PEM_cert_to_DER_cert(self.cert.read_text(encoding="ascii"))

    def copy_to(self, other: "Pair") -> None:
        """Put it where another one was, as a rotation does."""
        for source, target in ((self.cert, other.cert), (self.key, other.key)):
            new = target.with_suffix(".new")
            shutil.copy(source, new)
            new.replace(target)


def openssl(*words: object) -> None:
    """Run openssl."""
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)  # noqa: S603, S607
    assert done.returncode == 0, done.stderr


class Authority:
    """One that signs certificates; its own is `ca.pem`."""

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.own = Pair(folder / "ca.pem", folder / "ca.key")
        openssl("req", "-x509", *CURVE, "-nodes", "-days", 2, "-subj", f"/CN={name}",
                "-keyout", self.own.key, "-out", self.own.cert)  # fmt: skip

    def sign(self, name: str) -> Pair:
        """Make a certificate of this machine, for a server or for a client."""
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        openssl("req", "-x509", *CURVE, "-nodes", "-days", 2, "-subj", f"/CN={name}",
                "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
                "-CA", self.own.cert, "-CAkey", self.own.key, "-keyout", pair.key, "-out", pair.cert)  # fmt: skip
        return pair

    def client(self, pair: Pair | None = None) -> ssl.SSLContext:
        """Return the context of a client that trusts it, with a certificate of its own if it has one."""
        context = ssl.create_default_context(cafile=str(self.own.cert))
        if pair:
            context.load_cert_chain(pair.cert, pair.key)
        return context
