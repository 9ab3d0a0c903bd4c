"""A secret is named in the configuration, never written there: `${NAME}`.

It stands for the environment's variable of that name or, where there is none, for the text of the file that the variable
NAME_FILE names, which is how containers are handed theirs.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote

from limaml.errors import ConfigError

_NAME = r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}"


def is_named(text: str) -> bool:
    """Whether `text` is one `${NAME}` and nothing else."""
    return re.fullmatch(_NAME, text) is not None


def revealed(text: str, key: str) -> str:
    """`text` with every `${NAME}` replaced by what it stands for. Raises ConfigError, naming the setting `key`."""
    return re.sub(_NAME, lambda found: _secret(found[1], key), text)


def revealed_url(url: str, key: str) -> str:
    """As `revealed`; a URL holds a password percent-encoded, whatever is in it."""
    return re.sub(_NAME, lambda found: quote(_secret(found[1], key), safe=""), url)


def _secret(name: str, key: str) -> str:
    if name in os.environ:
        return os.environ[name]
    path = os.environ.get(f"{name}_FILE")
    if path is None:
        raise ConfigError(
            f"{key} refers to ${{{name}}}, which is not in the environment; set that variable, or {name}_FILE to the path of a "
            "file that holds it"
        )
    try:
        # Editors and `echo` end a file with a newline, which is no part of the secret.
        return Path(path).read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} refers to ${{{name}}}, but {name}_FILE = {path} is unreadable: {error}; correct it") from None
