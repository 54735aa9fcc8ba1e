# SPDX-License-Identifier: Apache-2.0
"""``python -m consumer`` is ``acestep-consumer``."""

from consumer.cli import main

if __name__ == "__main__":
    main()
