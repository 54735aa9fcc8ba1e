# SPDX-License-Identifier: Apache-2.0
"""Where Prometheus' tools come from: PATH first, then what was kept, and else a text that says what to do."""

import sys
from pathlib import Path

import pytest

from infra import promtool

STAND_IN = f"""#!{sys.executable}
import sys
print(sys.argv[1:], sys.stdin.read())
sys.exit(3)
"""


def stand_in(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is kept, on a machine whose PATH has nothing but one empty folder."""
    monkeypatch.setattr(promtool, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "kept" / "promtool"


def test_the_one_on_path_is_used_with_arguments_input_and_exit_status(kept: Path, tmp_path: Path) -> None:
    stand_in(tmp_path / "bin" / "promtool")
    done = promtool.run("check", Path("a file"), stdin="words")
    assert (done.returncode, done.stdout) == (3, "['check', 'a file'] words\n")
    assert not kept.exists()


def test_the_one_that_was_kept_is_not_fetched_again(kept: Path) -> None:
    stand_in(kept)
    assert promtool.tool("promtool") == str(kept)


def test_without_one_and_without_apt_the_error_says_what_to_do(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(promtool.PromtoolMissingError, match="apt-get install prometheus"):
        promtool.tool("promtool")
    monkeypatch.setattr(sys, "argv", ["promtool", "check", "rules"])
    assert promtool.main() == 1
    assert "apt-get install prometheus" in capsys.readouterr().err
    assert not kept.exists()
