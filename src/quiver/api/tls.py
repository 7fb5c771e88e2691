"""TLS: the certificate that the server shows, taken anew when its files change, and whose clients it lets in."""

import ssl
from pathlib import Path

from quiver.config import TlsConfig
from quiver.errors import ConfigError

Stamps = tuple[tuple[int, ...], ...]
"""What tells that a file is another one than before."""


class Certificate:
    """A certificate that may change under a server that goes on.

    A listener keeps the context that it was opened with. So this context is asked at each handshake which one is the
    newest: a connection has the old certificate or the new one, never a half of each.
    """

    def __init__(self, config: TlsConfig) -> None:
        """Load the files. Raises `ConfigError`, which names the one that is wrong."""
        self._config = config
        self._loaded = self._seen = self._stamps()
        self._newest = self.context = _load(config)
        self.context.sni_callback = self._choose
        """Asked whether or not the client says which name it wants."""

    def _choose(self, connection: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
        del name, context
        connection.context = self._newest

    def has_changed(self) -> bool:
        """Tell whether the files are others than those that were loaded last, and have rested since the last look.

        Who writes two files writes one of them first: a certificate is not taken before its key is there.
        """
        before, self._seen = self._seen, self._stamps()
        return self._seen != self._loaded and self._seen == before

    def reload(self) -> None:
        """Show what the files hold now. Raises `ConfigError` if it cannot be used: then what there was stays."""
        self._loaded = self._seen = self._stamps()
        self._newest = _load(self._config)

    def _stamps(self) -> Stamps:
        return tuple(_stamp(path) for path in (self._config.tls_cert, self._config.tls_key, self._config.tls_client_ca))


def _stamp(path: Path | None) -> tuple[int, ...]:
    try:
        found = path.stat() if path else None
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_size) if found else ()


def _load(config: TlsConfig) -> ssl.SSLContext:
    cert, key = _named("tls_cert", config.tls_cert), _named("tls_key", config.tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # with Python's own choice of ciphers
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "tls_cert", cert)  # only to learn which file is wrong
    try:
        # A password that is not given must not be asked for at the terminal.
        context.load_cert_chain(cert, key, password=config.tls_key_password.reveal)
    except ssl.SSLError as error:
        raise ConfigError(_complaint(error, cert, key)) from error
    if config.tls_client_ca:
        _load_authorities(context, "tls_client_ca", _named("tls_client_ca", config.tls_client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _named(setting: str, path: Path | None) -> Path:
    """Return a file that can be read."""
    if path is None:
        raise ConfigError(f"TLS is on, but {setting} names no file: it takes the path of a PEM file")
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ConfigError(f"cannot read {setting} {path}: {error.strerror}") from error


def _load_authorities(context: ssl.SSLContext, setting: str, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{setting} {path} holds no certificate in PEM form") from error


def _complaint(error: ssl.SSLError, cert: Path, key: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"the private key tls_key {key} is not that of the certificate tls_cert {cert}"
    if error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
        return (
            f"the certificate tls_cert {cert} is too weak ({error.reason}): make one with a longer key or a newer hash"
        )
    return f"tls_key {key} holds no private key in PEM form, or tls_key_password is not its password"
