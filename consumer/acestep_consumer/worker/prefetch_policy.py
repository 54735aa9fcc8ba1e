# SPDX-License-Identifier: Apache-2.0
"""Prefetch policy of ``ACESTEP_QUEUE_WORKERS=auto``: how many jobs one worker should hold. Pure: no clock, no I/O.

It is asked every few seconds with a reading of the worker, and answers with a number of workers. In plain words:

- **Start** at 2, as operators do by hand: one job renders while the next is fetched or the last is stored.
- **Stages.** Engines on a GPU tell what they can work on at once, so that every stage has a limit, and it is known how
  many jobs wait for a place (``execution.stage_limits``). Then nothing is tried: the number is what the stages need
  together. It grows while one of them has room and none is waited for, at first twofold at a time and in small strides
  once it was too many, and it falls where more jobs wait than a few. After every change as many jobs end as there were:
  only then its effect is seen.
- **Trials.** All that follows but the last is for engines that do not tell.
- **Steps.** Numbers come from one ladder: 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64 … up to the maximum. Every step is a
  third to a half more, so that a step that helps can be told from noise, and the top is reached in ten.
- **Evidence.** After every change the jobs of the old number leave first. Then throughput is measured until the time is
  long enough and every worker has finished several jobs, with the workers full all the while. An idle queue proves
  nothing: it ends a measurement, and takes back a step that was on trial.
- **A step up is a trial.** It stays when it brought a few percent, and the next one follows at once; else it is taken
  back, and the worker rests at the number before.
- **At rest** it tries again after a while, because the workload changes: in turn one step down, which stays when it
  loses next to nothing (a job that does not make the worker faster waits here instead of in the queue), and one up.
  Each trial that fails doubles the wait; a throughput that has clearly changed makes it short again. What a step up
  must bring is more than what a step down may lose, so that the two cannot alternate.
- **Memory goes first.** Work that had to wait for memory, or memory filled over a bound, takes one step back at once,
  even below the start, and the number that was too many is not tried again for some minutes, twice as many each time.
  The running jobs end before memory is judged again. Memory that a step back did not lower is not ours to lower: its
  share is ignored until it has fallen below the bound.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """The worker at one moment.

    Attributes:
        now_s: seconds of any steady clock.
        finished: jobs finished so far.
        work: what they were worth so far, in the unit that throughput is to be measured in.
        in_hand: jobs accepted and not finished.
        memory: share of the device's memory in use, 0 to 1; None: not known.
        reductions: times so far that memory made a pack smaller, or work wait.
        wanted: how many more jobs (below zero: fewer) the stages have work for; None: the engines do not tell.
    """

    now_s: float
    finished: int
    work: float
    in_hand: int
    memory: float | None = None
    reductions: int = 0
    wanted: int | None = None


class ThroughputSample:
    """One measurement with a fixed number of workers.

    Args:
        workers: how many there are.
        begin_after: jobs that must be finished before it begins: they were started under another number.
    """

    def __init__(self, workers: int, begin_after: int) -> None:
        self._workers = workers
        self._begin_after = begin_after
        self._first: WorkerSample | None = None
        self._last: WorkerSample | None = None
        self._readings = 0
        self._in_hand = 0
        # Sums over readings of time and work, each since the first reading.
        self._time = self._work = self._time_squared = self._time_work = 0.0

    def add(self, reading: WorkerSample) -> None:
        """Take in one reading; those before the beginning are ignored."""
        if self._first is None:
            if reading.finished < self._begin_after or reading.in_hand > self._workers:
                return
            self._first = reading
        time, work = reading.now_s - self._first.now_s, reading.work - self._first.work
        self._last = reading
        self._readings += 1
        self._in_hand += min(reading.in_hand, self._workers)
        self._time += time
        self._work += work
        self._time_squared += time * time
        self._time_work += time * work

    @property
    def seconds(self) -> float:
        """Seconds that it has gone on."""
        return self._last.now_s - self._first.now_s if self._first and self._last else 0.0

    @property
    def finished(self) -> int:
        """Jobs finished in it."""
        return self._last.finished - self._first.finished if self._first and self._last else 0

    @property
    def fullness(self) -> float:
        """Share of the workers that had a job, 0 to 1, on average."""
        return self._in_hand / (self._readings * self._workers) if self._readings else 0.0

    @property
    def rate(self) -> float:
        """Work a second: the slope of the line through all readings. 0 before there are two."""
        spread = self._readings * self._time_squared - self._time * self._time
        return (self._readings * self._time_work - self._time * self._work) / spread if spread > 0 else 0.0


Reason = Literal["start", "stages", "trial", "no gain", "memory", "idle"]

_FIRST_RUNGS = (1, 2, 3)
_SMALL_STRIDE = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchTuning:
    """The numbers of the policy.

    Attributes:
        measure_s: shortest measurement, seconds.
        jobs_each: jobs that each worker must finish in it, on average.
        least_jobs: jobs that must be finished in it, however few the workers.
        full: share of the workers that must have a job.
        idle_readings: readings in a row with fewer that count as an idle queue.
        gain: what a step up must bring, as a share.
        loss: what a step down may cost, as a share.
        change: difference between two measurements of one number that means another workload, as a share.
        rest_s: wait before the next trial after one that failed, seconds.
        longest_rest_s: bound of its doubling.
        memory: share of the memory above which it counts as short.
        relief: what a step back must take off that share.
        memory_s: time for which a number that was too many is not tried again, seconds.
        longest_memory_s: bound of its doubling.
        stage_readings: readings of the stages that a decision takes.
    """

    measure_s: float = 30.0
    jobs_each: int = 5
    least_jobs: int = 12
    full: float = 0.85
    idle_readings: int = 3
    gain: float = 0.05
    loss: float = 0.02
    change: float = 0.25
    rest_s: float = 180.0
    longest_rest_s: float = 900.0
    memory: float = 0.95
    relief: float = 0.01
    memory_s: float = 300.0
    longest_memory_s: float = 3600.0
    stage_readings: int = 4


@dataclass(frozen=True, slots=True)
class _PrefetchStep:
    """A step that has to prove itself: where it came from, and the throughput there."""

    home: int
    rate: float


def ladder(most: int) -> tuple[int, ...]:
    """Return the numbers of workers that are tried, from 1 to ``most``, each a third to a half more than the last."""
    rungs, step = list(_FIRST_RUNGS), 4
    while step <= most:
        rungs += [step, step + step // 2]
        step *= 2
    return (*(rung for rung in rungs if rung < most), most)


class PrefetchPolicy:
    """Decides on the number of workers.

    Args:
        start: the first number; without pressure on memory it never goes below.
        most: the highest number.
        habits: the numbers of the policy.
    """

    def __init__(self, start: int, most: int, habits: PrefetchTuning | None = None) -> None:
        self._habits = habits or PrefetchTuning()
        self._rungs = ladder(most)
        self._rung = self._floor = max(i for i, rung in enumerate(self._rungs) if rung <= min(start, most))
        # By the stages: the number, and what the latest readings wanted.
        self._followed: int | None = None
        self._wanted: list[int] = []
        self._settled_from = 0
        self._stride = 1.0
        self.reason: Reason = "start"
        self._measured = ThroughputSample(self.workers, 0)
        self._last: WorkerSample | None = None
        self._idle = 0
        self._trial: _PrefetchStep | None = None
        self._rate_at_rest: float | None = None
        self._upwards = True
        self._rest_s = self._habits.rest_s
        self._rest_until_s = 0.0
        self._ceiling = len(self._rungs)
        self._ceiling_until_s = 0.0
        self._memory_s = self._habits.memory_s
        self._share_before_step: float | None = None
        self._share_counts = True
        self._judge_memory_from = 0

    @property
    def workers(self) -> int:
        """The number it has decided on."""
        return self._rungs[self._rung] if self._followed is None else self._followed

    def read(self, reading: WorkerSample) -> int:
        """Take in a reading; return the number of workers to have from now on."""
        last, self._last = self._last, reading
        if last is None or _is_another_count(last, reading):
            self._judge_memory_from = min(self._judge_memory_from, reading.finished + self.workers)
            self._settled_from = min(self._settled_from, reading.finished + self.workers)
            self._measure_anew(reading)
            return self.workers
        if self._is_short_of_memory(last, reading):
            self._give_way(reading)
        elif reading.wanted is not None:
            self._follow(reading.wanted, reading)
        else:
            self._measured.add(reading)
            self._weigh(reading)
        return self.workers

    def _follow(self, wanted: int, reading: WorkerSample) -> None:
        """Go where the stages want it, once the jobs of the old number have left, and all readings since then agree."""
        before = self.workers
        if reading.finished < self._settled_from or reading.in_hand > before:
            self._wanted.clear()
            return
        # A worker that waits for messages has room because of that.
        self._wanted.append(min(wanted, 0) if reading.in_hand < before else wanted)
        if len(self._wanted) < self._habits.stage_readings:
            return
        step = min(*self._wanted, max(1, int(self._stride * before)))
        if step > 0:
            self._stride = min(1.0, 2 * self._stride)
        else:
            surplus = -sum(min(each, 1) for each in self._wanted) / len(self._wanted)
            step = -min(int(surplus), max(1, before // 4)) if surplus > max(2, before / 8) else 0
            self._stride = _SMALL_STRIDE if step else self._stride
        number = min(max(before + step, self._rungs[self._floor]), self._most_by_memory(reading))
        self._wanted.clear()
        if number != before:
            self._trial = None
            self._move(max(i for i, rung in enumerate(self._rungs) if rung <= number), "stages", reading)
            self._followed = number
            self._settled_from = reading.finished + before

    def _most_by_memory(self, reading: WorkerSample) -> int:
        if self._ceiling == len(self._rungs) or reading.now_s >= self._ceiling_until_s:
            return self._rungs[-1]
        return self._rungs[self._ceiling] - 1

    def _weigh(self, reading: WorkerSample) -> None:
        """Decide by the measurement, if it says something by now."""
        habits = self._habits
        self._idle = self._idle + 1 if reading.in_hand < habits.full * self.workers else 0
        if self._idle >= habits.idle_readings:
            self._on_idle(reading)
        elif self._is_complete():
            self._on_measured(self._measured.rate, reading)

    def _is_complete(self) -> bool:
        habits, measured = self._habits, self._measured
        jobs = max(habits.least_jobs, habits.jobs_each * self.workers)
        return measured.seconds >= habits.measure_s and measured.finished >= jobs

    def _on_idle(self, reading: WorkerSample) -> None:
        trial, self._trial = self._trial, None
        if trial is None:
            self._measure_anew(reading)
        else:
            self._move(trial.home, "idle", reading)

    def _on_measured(self, rate: float, reading: WorkerSample) -> None:
        if self._measured.fullness < self._habits.full:
            self._on_idle(reading)
        elif self._trial is None:
            self._on_rest(rate, reading)
        else:
            self._judge(self._trial, rate, reading)

    def _judge(self, trial: _PrefetchStep, rate: float, reading: WorkerSample) -> None:
        """Keep the step, and go on in the same direction at once; or take it back, and rest."""
        up, habits = self._rung > trial.home, self._habits
        enough = trial.rate * (1 + habits.gain if up else 1 - habits.loss)
        self._trial = None
        if rate <= 0 or rate < enough:
            self._upwards = not up
            self._rest_until_s = reading.now_s + self._rest_s
            self._rest_s = min(2 * self._rest_s, habits.longest_rest_s)
            self._rate_at_rest = trial.rate
            self._move(trial.home, "no gain", reading)
            return
        if self._rung >= self._ceiling:
            self._ceiling, self._memory_s = len(self._rungs), habits.memory_s
        self._rate_at_rest = rate
        if not self._try(rate, reading, up=up):
            self._upwards = not up
            self._rest_until_s = reading.now_s + self._rest_s
            self._measure_anew(reading)

    def _on_rest(self, rate: float, reading: WorkerSample) -> None:
        """Note the throughput of this number, and start a trial when it is time."""
        before, self._rate_at_rest = self._rate_at_rest, rate
        if before is not None and abs(rate - before) > self._habits.change * before:
            self._rest_s = self._habits.rest_s
            self._rest_until_s = min(self._rest_until_s, reading.now_s)
            self._upwards = True
        tried = reading.now_s >= self._rest_until_s and (
            self._try(rate, reading, up=self._upwards) or self._try(rate, reading, up=not self._upwards)
        )
        if not tried:
            self._measure_anew(reading)

    def _try(self, rate: float, reading: WorkerSample, *, up: bool) -> bool:
        """Take a step on trial; tell whether there was one to take."""
        rung = self._rung + 1 if up else self._rung - 1
        allowed = rung < self._ceiling or reading.now_s >= self._ceiling_until_s
        if up and not (allowed and rung < len(self._rungs)):
            return False
        if not up and rung < self._floor:
            return False
        self._trial = _PrefetchStep(self._rung, rate)
        self._move(rung, "trial", reading)
        return True

    def _is_short_of_memory(self, last: WorkerSample, reading: WorkerSample) -> bool:
        """Tell whether memory is short, once the jobs of a larger number have left."""
        memory, before = reading.memory, self._share_before_step
        short = memory is not None and memory >= self._habits.memory
        self._share_counts = self._share_counts or not short
        if reading.finished < self._judge_memory_from or reading.in_hand > self.workers:
            return False
        if short and memory is not None and before is not None:
            self._share_counts = memory <= before - self._habits.relief
        self._share_before_step = None
        return reading.reductions > last.reductions or (short and self._share_counts)

    def _give_way(self, reading: WorkerSample) -> None:
        """Go one step back, if there is one, and stay below for a while."""
        too_many = self._rung + (self.workers > self._rungs[self._rung])
        if too_many == 0:
            return
        self._ceiling = too_many
        self._ceiling_until_s = reading.now_s + self._memory_s
        self._memory_s = min(2 * self._memory_s, self._habits.longest_memory_s)
        self._share_before_step = reading.memory
        self._trial = self._rate_at_rest = None
        self._rest_until_s = reading.now_s + self._rest_s
        self._move(too_many - 1, "memory", reading)
        self._judge_memory_from = reading.finished + self.workers

    def _move(self, rung: int, reason: Reason, reading: WorkerSample) -> None:
        self._rung, self.reason, self._followed, self._wanted = rung, reason, None, []
        self._measure_anew(reading)

    def _measure_anew(self, reading: WorkerSample) -> None:
        """Forget the measurement; the next begins when every worker has had a job of this number."""
        self._idle = 0
        self._measured = ThroughputSample(self.workers, reading.finished + self.workers)


def _is_another_count(last: WorkerSample, reading: WorkerSample) -> bool:
    """Tell whether a counter or the clock began anew, so that differences mean nothing."""
    return reading.now_s <= last.now_s or reading.finished < last.finished or reading.work < last.work
