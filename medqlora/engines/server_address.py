"""A server's address, its key and its proxies, checked before anything is sent.

No message repeats an address or a key that may be secret.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from medqlora.core.errors import ConfigError

EXAMPLE = "http://127.0.0.1:8000/v1"
PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation)
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SHORTEST_SECRET = 8  # Characters; words such as "none" and "EMPTY" stand for no key.
LONGEST_TEXT = 300  # Characters of a server's text in a message.
SECRETS = re.compile(r"(?<=//)[^/@\s]*:[^/@\s]*(?=@)|\bsk-[\w-]{6,}|(?<=bearer )\S+", re.IGNORECASE)


def check_address(address: str) -> None:
    """Refuse an address that is none, or that holds a secret.

    Raises:
        ConfigError: the message shows the address only where it holds no password or query.
    """
    place = find_odd_character(address)
    if place:
        raise ConfigError(
            f"--server has a space, a line break or a character outside ASCII at place {place};"
            f" expected an address as {EXAMPLE}"
        )
    if "@" in address:
        raise ConfigError(
            "--server has an @, so a user name or a password, in it; leave it out, and give a key"
            " by --api_key_variable"
        )
    if "?" in address or "#" in address:
        raise ConfigError(
            f"--server has a ? or # in it; expected an address up to /v1, as {EXAMPLE}"
        )
    try:
        parts = urlsplit(address)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # A port that is no number, or brackets around no IPv6 address.
        complete = False
    if not complete:
        raise ConfigError(
            f"--server {address[:200]}: expected http:// or https://, a host and a port, as"
            f" {EXAMPLE} or http://[::1]:8000/v1"
        )
    if parts.path.rstrip("/").endswith("/completions"):
        raise ConfigError(f"--server {address[:200]}: give the address up to /v1, as {EXAMPLE}")


def read_key(environ: Mapping[str, str], variable: str) -> str | None:
    """Return the server's key; None where there is none.

    Args:
        environ: the environment, whose proxies are checked too.
        variable: the name of the key's variable.

    Raises:
        ConfigError: a key that no HTTP header can hold, or a proxy without a right address.
    """
    for name, value in environ.items():
        if name.lower() in PROXIES and not is_proxy(value):
            raise ConfigError(
                f"environment variable {name} is no address of a proxy; expected a value as"
                " http://127.0.0.1:3128, or unset it"
            )
    # A name of this form is no key by mistake, so that it may be shown.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ConfigError(
            "--api_key_variable: expected the name of an environment variable, as OPENAI_API_KEY,"
            " and not the key itself"
        )
    key = environ.get(variable) or None
    place = find_odd_character(key or "")
    if place:
        raise ConfigError(
            f"environment variable {variable}: the key has a space, a line break or a character"
            f" outside ASCII at place {place} of {len(key)}; set it without"
        )
    return key


def is_proxy(value: str) -> bool:
    """Whether an environment variable's value is the address of a proxy, or empty."""
    if find_odd_character(value):
        return False
    try:
        # A proxy may be given without a scheme.
        parts = urlsplit(value if "://" in value else "http://" + value)
        known = parts.scheme in ("http", "https", "socks5", "socks5h")
        return not value or bool(known and parts.hostname and parts.port != 0)
    except ValueError:
        return False


def find_odd_character(text: str) -> int:
    """Return the place, from 1, of the first character that no header or address holds, or 0."""
    odd = (place for place, character in enumerate(text, 1) if character not in PRINTABLE)
    return next(odd, 0)


def hide_secrets(text: str, key: str | None) -> str:
    """Return a server's text as one short line without the key, tokens and passwords."""
    text = " ".join(text.split())
    if key and len(key) >= SHORTEST_SECRET:
        for spelling in (key, quote(key, safe="")):
            text = text.replace(spelling, "***")
    # The text is cut last, or a part of a secret could be left at its end.
    text = SECRETS.sub("***", text)[:LONGEST_TEXT]
    # JSON may hold a lone surrogate, which no terminal and no file takes.
    return "".join(c if c.isprintable() else "?" for c in text)
