"""Keeps keys and tokens out of texts that end in files: errors and details of rewards, which people share.

A service may say back what it was sent, and a reward's exception may hold the key that it was made with.
"""

from __future__ import annotations

import os
import re

SECRET = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|_AUTH$", re.IGNORECASE
)
"""Names of environment variables whose values are taken for secrets."""
SHORTEST = 8
"""Shorter values (1, true, a user's name) would blank out plain words."""
HIDDEN = "***"


def hide(text: str, *secrets: str) -> str:
    """The text with ``***`` in place of each secret, whatever its case.

    secrets: taken as they are, of any length; and the values, of at least 8 characters, of the environment variables
    whose names speak of a key, a token, a secret or a password.
    """
    for secret in sorted({*secrets, *_environment()} - {""}, key=len, reverse=True):
        if secret.lower() in text.lower():
            text = re.sub(re.escape(secret), HIDDEN, text, flags=re.IGNORECASE)
    return text


def _environment() -> list[str]:
    return [value for name, value in os.environ.items() if len(value) >= SHORTEST and SECRET.search(name)]
