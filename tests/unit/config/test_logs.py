# SPDX-License-Identifier: Apache-2.0
"""Log lines: JSON off a terminal, with the module that wrote them, ours and libraries' alike."""

import json
import subprocess
import sys

LINES = """
import logging, structlog
from acestep_consumer.config.logs import set_log_level, set_up_logs
log = structlog.get_logger()
assert set_up_logs("info", "auto")
log.info("ours", answer=42)
log.debug("too quiet")
logging.getLogger("some.library").warning("theirs")
set_log_level("debug")
log.debug("now heard")
"""


def test_each_line_names_its_module_and_the_level_can_change() -> None:
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"], line["level"], line["logger"]) for line in lines] == [
        ("ours", "info", "__main__"),
        ("theirs", "warning", "some.library"),
        ("now heard", "debug", "__main__"),
    ]
    assert lines[0]["answer"] == 42
