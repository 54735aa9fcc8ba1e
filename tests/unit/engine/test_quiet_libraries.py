# SPDX-License-Identifier: Apache-2.0
"""Words of libraries while they are imported: no business of who writes a tiny checkpoint or starts a worker."""

import subprocess
import sys


def test_importing_diffusers_beside_torchao_says_nothing() -> None:
    code = "import acestep_consumer.engine.testing.tiny_checkpoint, torchao"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "torchao" not in done.stderr
    assert "_pytree" not in done.stderr
