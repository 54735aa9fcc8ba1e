# SPDX-License-Identifier: Apache-2.0
"""Imports torch, diffusers and transformers in an engine process, without what they bring along and nothing here uses.

Imports are nine tenths of an engine's start on a processor, and most of it on a GPU whose kernels are in the cache.
"""

import atexit
import functools
import gc
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

UNUSED: Final = ("boto3", "peft")
"""Imported by accelerate (for SageMaker) and by diffusers (for its own LoRA loader) where they are installed."""

QUANTIZER: Final = "torchao"
"""Imported by transformers and diffusers where it is installed; used for quantized weights alone."""


@contextmanager
def library_imports(*, quantized: bool) -> Iterator[None]:
    """Import the libraries in the body; it takes four fifths of the time, or less.

    ``quantized``: weights are quantized, by ``ACESTEP_QUANTIZATION`` or as they were published.
    """
    unwanted = UNUSED if quantized else (*UNUSED, QUANTIZER)
    with _collection_paused(), _hidden(unwanted), _distributions_read_once():
        yield


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Collect no garbage in the body, and never look again at what it made.

    Torch and diffusers make a million objects that stay, and the collector would go through them again and again, a
    sixth of the time that the imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # Otherwise a command says at its end, in a hundred lines on the terminal, that Triton's objects have leaked.
        atexit.register(gc.unfreeze)


@contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Let packages that are not imported yet count as not installed in the body.

    None in ``sys.modules`` is the import system's own way to say that: ``find_spec`` and ``import`` both heed it. The
    libraries keep what they find.
    """
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # as said
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def _distributions_read_once() -> Iterator[None]:
    """Read the metadata of all installed packages once in the body: diffusers and transformers each do, at import."""
    read = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(read)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = read
