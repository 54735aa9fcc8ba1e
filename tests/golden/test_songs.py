# SPDX-License-Identifier: Apache-2.0
"""Songs of this worker against those of the original ACE-Step 1.5, from the same weights and the same noise."""

import pytest

from tests.golden.compare import differences
from tests.golden.departures import DEPARTURES
from tests.golden.golden_data import GoldenCase, songs
from tests.golden.golden_worker import GoldenWorker


def parameters() -> list[object]:
    """Return the cases model by model, so that a process loads few of them."""
    equal = [case for case in songs() if case.name not in DEPARTURES]
    ordered = sorted(equal, key=lambda case: (case.model, case.name))
    return [pytest.param(case, id=case.name) for case in ordered]


@pytest.mark.parametrize("case", parameters())
def test_a_song_equals_the_originals(case: GoldenCase, worker: GoldenWorker) -> None:
    assert list(differences(worker.make(case), case)) == []
