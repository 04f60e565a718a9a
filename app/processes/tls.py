"""TLS: the certificate that the service answers HTTPS with, if the settings name one."""

import ssl

from app.settings import PREFIX, Settings, SettingsError


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the server's TLS context (TLS 1.2 and 1.3), or None without a certificate.

    Raises `SettingsError` if a file cannot be read, or if the key is not the certificate's or has a passphrase.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    for name, path in (("TLS_CERT", settings.tls_cert), ("TLS_KEY", settings.tls_key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise SettingsError(f"{PREFIX}{name} is {path}, which cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without `password`, OpenSSL would ask for a passphrase on the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(_explain(settings, error)) from None
    return context


def _explain(settings: Settings, error: Exception) -> str:
    files = f"{PREFIX}TLS_CERT ({settings.tls_cert}) and {PREFIX}TLS_KEY ({settings.tls_key})"
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        return f"{files} do not belong together: the key is not that of the certificate"
    return f"{files} must be PEM files, the key without a passphrase: {error}"
