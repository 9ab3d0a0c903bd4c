"""Who may ask: an optional bearer token, and loopback only without one."""

import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from limaml.config import ServingConfig
from limaml.errors import ConfigError
from serving.api import RequestError


def read_token(cfg: ServingConfig) -> bytes | None:
    """The token `/rank` asks for, None if none is. Raises ConfigError for a file without one, and where the service would
    listen beyond loopback without a token and without `allow_remote_without_token`."""
    if cfg.token_file:
        try:
            token = Path(cfg.token_file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"serving.token_file must be a readable file, got {cfg.token_file}: {error.strerror}") from None
        if not token:
            raise ConfigError(f"serving.token_file must hold a token, got an empty file {cfg.token_file}; write one into it")
        return token
    if not _is_loopback(cfg.host) and not cfg.allow_remote_without_token:
        raise ConfigError(
            f"serving.host must be loopback where no token is asked for, got {cfg.host}; name a serving.token_file, or set "
            "serving.allow_remote_without_token where something else keeps strangers out"
        )
    return None


def check_token(headers: Iterable[tuple[bytes, bytes]], token: bytes) -> None:
    """Raises RequestError (401) unless the request carries `token`; compared in constant time."""
    given = next((value for name, value in headers if name == b"authorization"), b"")
    scheme, _, credentials = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(credentials.strip(), token):
        raise RequestError(
            401,
            field="Authorization",
            rule="must be Bearer and the service's token",
            value=None,
            remedy="send the token that the service was given in serving.token_file",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
