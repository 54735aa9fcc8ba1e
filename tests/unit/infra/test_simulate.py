# SPDX-License-Identifier: Apache-2.0
"""``python -m infra.simulate``: what it reads, what it makes up, and what it answers."""

import json
from pathlib import Path

import pytest

from infra.simulate import main, workers_of
from infra.sizing.arrivals import TraceUnreadableError, bursty, denser, poisson, read_trace
from infra.sizing.report import requests_of, simulate
from infra.sizing.service_times import constant, read_measured, read_plan
from tests.support.jobs import make_job, make_manifest

PLAN = {
    "songs": {"a_minute": 30.0},
    "workers": {"recommended": 8},
    "workload": {"batch": 2},
    "card": {"compute": 1.0},
}


def written(folder: Path, text: str, name: str = "file") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "3\n1\n\n5.5\n",
        "at\n3\n1\n5.5\n",
        "task,timestamp\na,2026-02-03T00:00:03Z\nb,2026-02-03T00:00:01Z\nc,2026-02-03T01:00:05.5+01:00\n",
        "\ufefftime,task\n3,a\n1,b\n5.5,c\n",
    ],
)
def test_a_trace_is_seconds_or_dates_in_the_first_or_the_named_column(text: str, tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, text)) == [0, 2, 4.5]


def test_events_tell_when_their_requests_were_sent(tmp_path: Path) -> None:
    def line(finished_at: str, **timings: float | None) -> str:
        return json.dumps(
            {"type": "acestep.job.completed.v1", "data": {"finished_at": finished_at, "timings": timings}}
        )

    lines = [
        json.dumps({"type": "acestep.job.started.v1", "data": {"task_id": "t"}}),
        line("2026-02-03T00:01:00Z", total=10, queued=30),
        line("2026-02-03T00:00:50Z", total=40, queued=None),
        '{"type": "acestep.job.comp',
    ]
    assert read_trace(written(tmp_path, "\n".join(lines))) == [0, 10]


def test_a_trace_that_cannot_be_read_is_told_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(TraceUnreadableError, match="line 3: 'tomorrow' is not a time"):
        read_trace(written(tmp_path, "at\n1\ntomorrow\n"))
    with pytest.raises(TraceUnreadableError, match="no arrival times"):
        read_trace(written(tmp_path, "at\n"))


def test_made_up_arrivals_have_the_rate_that_was_asked_for_and_come_again_with_the_seed() -> None:
    times = poisson(360, 200, seed=3)
    assert len(times) == pytest.approx(360 * 200, rel=0.02)
    assert times == sorted(times)
    assert times == poisson(360, 200, seed=3)
    assert times != poisson(360, 200, seed=4)
    assert denser([2, 4], 2) == [1, 2]


def test_bursts_have_the_same_mean_and_more_spread() -> None:
    def spread(times: list[float]) -> float:
        """Variance of the arrivals a minute by their mean: 1 for Poisson."""
        counts = [0] * (200 * 60 + 1)
        for time in times:
            counts[int(time / 60)] += 1
        mean = sum(counts) / len(counts)
        return sum((count - mean) ** 2 for count in counts) / len(counts) / mean

    bursts = bursty(360, 200, 5, seed=3)
    assert len(bursts) == pytest.approx(360 * 200, rel=0.1)
    assert bursts == sorted(bursts)
    assert spread(poisson(360, 200, seed=3)) == pytest.approx(1, abs=0.1)
    assert spread(bursts) > 5
    with pytest.raises(ValueError, match="1 to 6 times"):
        bursty(360, 1, 7, seed=3)


def test_durations_are_numbers_events_or_manifests_one_a_line_or_a_folder(tmp_path: Path) -> None:
    manifest = make_manifest(make_job()).model_dump(mode="json")
    assert read_measured(written(tmp_path, "2.5\n\n4\n"), 3).seconds == (2.5, 4)
    assert read_measured(written(tmp_path, "2.5\n"), 3).seconds == (2.5,)
    started = {"type": "acestep.job.started.v1", "data": {"task_id": "t"}}
    lines = [started, {"type": "acestep.job.completed.v1", "data": manifest}, {"data": manifest}]
    events = written(tmp_path, "\n".join(json.dumps(line) for line in lines))
    assert read_measured(events, 3).seconds == pytest.approx((1 / 3, 1 / 3))
    for task in ("a", "b"):
        (tmp_path / "jobs" / task).mkdir(parents=True)
        written(tmp_path / "jobs" / task, json.dumps(manifest, indent=2), "manifest.json")
    assert len(read_measured(tmp_path / "jobs", 3).seconds) == 2


@pytest.mark.parametrize("text", ["", "nothing\n", '{"data": {}}\n', "0\n-1\n"])
def test_durations_that_say_nothing_are_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(TraceUnreadableError):
        read_measured(written(tmp_path, text), 1)


def test_a_plan_becomes_a_full_worker_that_makes_as_many_songs(tmp_path: Path) -> None:
    """30 songs a minute in requests of 2 are 15 requests a minute: with 8 running, each takes 32 s."""
    services = read_plan(written(tmp_path, json.dumps(PLAN)))
    assert (services.seconds, services.in_hand) == ((32.0,), 8)
    assert "UNKNOWN" not in services.rests_on
    unknown = read_plan(written(tmp_path, json.dumps({**PLAN, "card": {"compute": None}})))
    assert "UNKNOWN GPU: that is an H200's speed" in unknown.rests_on
    for broken in ("{}", "[]", "no", json.dumps({**PLAN, "songs": {"a_minute": None}})):
        with pytest.raises(TraceUnreadableError):
            read_plan(written(tmp_path, broken))


def test_the_smallest_number_of_workers_that_is_enough_is_named() -> None:
    services = constant(30, 2)
    requests = requests_of(poisson(600, 8, 1), services, seed=1)
    answer = simulate(requests, services, range(1, 8), queue_limit=200, target_s=20)
    rows = {row.workers: row for row in answer.rows}
    # 600 an hour of 30 s are 5 places' work: two workers of two places drown, three are busy for five sixths.
    assert rows[2].refused > 0
    assert rows[3].utilisation == pytest.approx(5 / 6, rel=0.05)
    assert answer.enough is not None
    assert rows[answer.enough].p95_s <= 20
    assert rows[answer.enough - 1].p95_s > 20 or rows[answer.enough - 1].refused
    waits = [row.mean_wait_s for row in answer.rows[2:]]
    assert waits == sorted(waits, reverse=True)


def test_the_command_prints_a_row_for_each_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = written(tmp_path, "\n".join(str(10 * number) for number in range(100)))
    assert main([str(trace), "--takes", "25", "--workers", "1..3", "--queue-limit", "50"]) == 0
    text = capsys.readouterr().out
    assert "100 requests in 0.28 h" in text
    assert [line.split()[0] for line in text.splitlines()[3:6]] == ["1", "2", "3"]
    assert "Enough: 3" in text


def test_the_command_answers_in_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = written(tmp_path, json.dumps(PLAN))
    arguments = ["--an-hour", "3000", "--hours", "1", "--peak", "3", "--plan", str(plan), "--workers", "2,4", "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["workers"] for row in answer["rows"]] == [2, 4]
    assert answer["in_hand"] == 8
    assert answer["service_s"] == pytest.approx(32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--takes", "5"], "--an-hour"),
        (["nowhere.csv", "--takes", "5"], "nowhere.csv"),
        (["--an-hour", "5", "--plan", "nowhere.json"], "nowhere.json"),
        (["--an-hour", "5", "--takes", "5", "--peak", "9"], "1 to 6"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "0", "1..", "3..1", "a", "1..x"])
def test_a_number_of_workers_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--an-hour", "5", "--takes", "5", "--workers", text])
    assert "is not a number of workers" in capsys.readouterr().err


def test_numbers_of_workers_are_a_range_a_list_or_one() -> None:
    assert (workers_of("1..3"), workers_of("2,4"), workers_of("5")) == ([1, 2, 3], [2, 4], [5])
