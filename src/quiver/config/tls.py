"""Settings of TLS: the certificate that the server shows, and whose certificates it asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quiver.config.setting import Secret, setting

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files in PEM form; they are read again when they change."""

    tls: Switch = setting(
        "auto",
        "Whether the port speaks HTTPS; auto: where any of the files below is named. True and false do for on and off.",
        also=("SERVER_SSL_ENABLED",),
    )
    tls_cert: Path | None = setting(
        None,
        "File of the server's certificate, followed by those that lead to its root.",
        also=("TLS_SERVER_CERT_PATH", "SERVER_SSL_CERT_PATH"),
    )
    tls_key: Path | None = setting(
        None,
        "File of the certificate's private key; it may be the same file.",
        also=("TLS_SERVER_KEY_PATH", "SERVER_SSL_KEY_PATH"),
    )
    tls_key_password: Secret = setting(Secret(""), "Password of the private key, where it has one.")
    tls_client_ca: Path | None = setting(
        None,
        "File of the authorities whose client certificates are good; where it is named, nobody is let in without one.",
    )

    @property
    def is_on(self) -> bool:
        """Whether the port speaks HTTPS."""
        files = (self.tls_cert, self.tls_key, self.tls_client_ca)
        return self.tls == "on" or (self.tls == "auto" and any(files))
