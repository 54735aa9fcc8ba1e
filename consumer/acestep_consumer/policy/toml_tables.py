# SPDX-License-Identifier: Apache-2.0
"""TOML files of an operator's own tables, read into their models. Errors name the setting, the file and the rule."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

Table = TypeVar("Table", bound=BaseModel)


def read_table(path: Path, model: type[Table], setting: str, failure: type[Exception], hint: str = "") -> Table:
    """Read a table. ``hint`` follows the message where there is no such file.

    Raises:
        failure: it cannot be read or is invalid.
    """
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise failure(f"{setting}: {path} cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError:
        raise failure(f"{setting}: {path} is not UTF-8 text") from None  # the error quotes the bytes
    except RecursionError as error:
        raise failure(f"{setting}: {path} is nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        raise failure(f"{setting}: {path} is not TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False))
        raise failure(f"{setting}: {path}: {problems}") from error
