# SPDX-License-Identifier: Apache-2.0
"""The folder of results in storage, kept out of what clients read: errors, warnings and edits name objects in it."""

import re
from collections.abc import Mapping
from typing import Any

from acestep_consumer.config.settings import StorageSettings
from acestep_consumer.domain.objects import join_key


class ResultFolder:
    """Address of the results, ``s3://<bucket>/<prefix>/``.

    Other places in the bucket stay as they are: clients named them, such as a LoRA's, and may send them again.
    """

    def __init__(self, settings: StorageSettings) -> None:
        bucket = re.escape(settings.bucket)
        folder = re.escape(join_key(settings.bucket, settings.prefix))
        self._address = re.compile(rf"s3://(?:{folder}(?=/)|{bucket}(?![\w/-]|\.\w))")

    def hide(self, value: Any) -> Any:
        """Return JSON in which an address below the folder is a path, as ``/v1/audio`` takes that of a song."""
        if isinstance(value, str):
            return self._address.sub(_shown, value) if "s3://" in value else value
        if isinstance(value, Mapping):
            return {name: self.hide(part) for name, part in value.items()}
        return [self.hide(part) for part in value] if isinstance(value, list | tuple) else value


def _shown(found: re.Match[str]) -> str:
    return "" if found.string.startswith("/", found.end()) else "the bucket"
