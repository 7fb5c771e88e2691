"""Headers that tell browsers what not to do with a reply; other clients do not look at them."""

from collections.abc import Mapping

from quiver.config import TlsConfig

NO_SNIFFING: Mapping[str, str] = {"x-content-type-options": "nosniff"}
"""A reply is what it says it is, though what a user sent may stand in it."""
HTTPS_ONLY: Mapping[str, str] = {"strict-transport-security": "max-age=31536000"}
NOT_KEPT: Mapping[str, str] = {"cache-control": "no-store"}
"""No cache between here and the client knows our keys: it would show one caller's reply to another."""


def every_reply(tls: TlsConfig) -> dict[str, str]:
    """Return what stands in every reply, a refusal before anything was read included."""
    return {**NO_SNIFFING, **(HTTPS_ONLY if tls.is_on else {})}


def page(*, script: str = "", style: str = "'unsafe-inline'") -> dict[str, str]:
    """Return what stands beside an HTML page: it loads what is served here alone, and nobody frames it.

    `script` is the hash of the one script that stands in the page itself (`'sha256-…'`), `style` what else than files may.
    """
    policy = (
        "default-src 'none'",
        f"script-src 'self' {script}".rstrip(),
        f"style-src 'self' {style}".rstrip(),
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "content-security-policy": "; ".join(policy),
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
    }
