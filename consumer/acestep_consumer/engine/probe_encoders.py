# SPDX-License-Identifier: Apache-2.0
"""Encoder probe: ``python -m acestep_consumer.engine.probe_encoders`` prints as JSON which formats can be written.

For ``doctor``, which must not import FFmpeg itself.
"""

import json
import sys


def main() -> None:
    """Print ``formats``, which can be encoded, and ``decoder``, why inputs cannot be decoded (null: they can).

    Exits with a line on stderr where the packages are missing.
    """
    try:
        from acestep_consumer.audio.codec import check_decoder, check_encoders  # noqa: PLC0415 - the package may be missing
    except ImportError as error:
        sys.exit(f"{error.name} is missing: pip install 'acestep-consumer[engine]'")
    sys.stdout.write(json.dumps({"formats": check_encoders(), "decoder": check_decoder()}) + "\n")


if __name__ == "__main__":
    main()
