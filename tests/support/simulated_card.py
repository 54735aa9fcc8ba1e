# SPDX-License-Identifier: Apache-2.0
"""A worker with a card that exists only as arithmetic: jobs, packs, memory and a clock, in simulated time."""

import random
from dataclasses import dataclass, field

from acestep_consumer.worker.prefetch_policy import PrefetchPolicy, WorkerSample


@dataclass
class SimulatedCard:
    """Renders packs of at most ``pack`` jobs, whatever is running when the last pack ends.

    A pack of ``n`` jobs takes ``launch_s + n * song_s`` seconds, so throughput rises with the workers towards
    ``1 / song_s`` and is flat beyond ``pack``. ``noise`` is the relative spread of a pack's time. Jobs wait in a queue
    that is never empty, or, with ``arrivals_s``, come one by one with that many seconds between them.
    """

    launch_s: float = 1.0
    song_s: float = 0.1
    pack: int = 64
    noise: float = 0.03
    memory_gb: float = 10.0
    memory_gb_each: float = 0.0
    limit_gb: float = 100.0
    reduces_above: int = 1_000
    arrivals_s: float | None = None
    seed: int = 1
    now_s: float = 1_000.0
    finished: int = 0
    reductions: int = 0
    in_hand: int = 0
    _packed: int = 0
    _pack_ends_s: float = 0.0
    _arrived_s: float = field(init=False)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - noise, not a secret
        self._arrived_s = self.now_s

    def capacity(self, workers: int) -> float:
        """Jobs a second with that many workers, without noise."""
        packed = min(workers, self.pack)
        return packed / (self.launch_s + packed * self.song_s)

    def run(self, seconds: float, workers: int) -> WorkerSample:
        """Let simulated time pass with this prefetch; return what is to be seen then."""
        end = self.now_s + seconds
        self._take(workers)
        while self._packed and self._pack_ends_s <= end:
            self.now_s = self._pack_ends_s
            self.finished += self._packed
            self.in_hand -= self._packed
            self._packed = 0
            self._take(workers)
        self.now_s = end
        share = (self.memory_gb + self.memory_gb_each * self.in_hand) / self.limit_gb
        return WorkerSample(
            now_s=end,
            finished=self.finished,
            work=float(self.finished),
            in_hand=self.in_hand,
            memory=share,
            reductions=self.reductions,
        )

    def _take(self, workers: int) -> None:
        """Fill the hands from the queue, and pack what they hold when nothing is being rendered."""
        room = max(0, workers - self.in_hand)
        if self.arrivals_s is not None:
            waiting = int((self.now_s - self._arrived_s) / self.arrivals_s)
            room = min(room, waiting)
            self._arrived_s += room * self.arrivals_s
        self.in_hand += room
        if not self._packed and self.in_hand:
            self._packed = min(self.in_hand, self.pack)
            self.reductions += self.in_hand > self.reduces_above
            seconds = self.launch_s + self._packed * self.song_s
            self._pack_ends_s = self.now_s + seconds * max(0.1, self._random.gauss(1, self.noise))


def drive(card: SimulatedCard, concurrency: PrefetchPolicy, seconds: float, interval_s: float = 2.0) -> list[int]:
    """Let the controller run the card; return the number of workers after each reading."""
    end, numbers = card.now_s + seconds, []
    while card.now_s < end:
        numbers.append(concurrency.read(card.run(interval_s, concurrency.workers)))
    return numbers
