# SPDX-License-Identifier: Apache-2.0
"""Secrets from files: ``NAME_FILE`` is the path of a file that contains the value of ``NAME``.

Docker and Kubernetes mount secrets as files, because environment variables are inherited by every child process and
visible in process listings.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

SUFFIX: Final = "_FILE"

_MAX_BYTES: Final = 1 << 16


class SecretFileError(Exception):
    """A secret file is unusable; the message names variable, path and reason, never the file's content."""


def layered(layers: Iterable[Mapping[str, str]], secrets: Iterable[str]) -> dict[str, str]:
    """Merge layers of variables, later ones over earlier ones; a later ``NAME`` overrides an earlier ``NAME_FILE``.

    Raises:
        SecretFileError: a layer sets both.
    """
    joined: dict[str, str] = {}
    for layer in layers:
        for name in secrets:
            file = name + SUFFIX
            if name in layer and file in layer:
                raise SecretFileError(f"{name} and {file} are both set: unset one of them")
            if name in layer or file in layer:
                joined.pop(name, None)
                joined.pop(file, None)
        joined.update(layer)
    return joined


def read_all(values: Mapping[str, str], secrets: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, content) of each secret that ``values`` gives as a file. Raises ``SecretFileError``."""
    for name in secrets:
        if (file := values.get(name + SUFFIX)) is not None:
            yield name, _read(name + SUFFIX, Path(file.strip()))


def _read(variable: str, path: Path) -> str:
    """Return the file's text without the trailing newline that editors and ``echo`` add."""
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise SecretFileError(f"{variable}: {path} cannot be read: {error.strerror}") from error
    except RuntimeError as error:
        raise SecretFileError(f"{variable}: {path}: the user's home folder is not known") from error
    except UnicodeDecodeError:
        raise SecretFileError(f"{variable}: {path} is not UTF-8 text") from None  # the error itself quotes the bytes
    if not text.strip():
        raise SecretFileError(f"{variable}: {path} is empty")
    if len(content) > _MAX_BYTES:
        raise SecretFileError(f"{variable}: {path} is larger than {_MAX_BYTES:,} bytes: is it the right file?")
    return text
