# SPDX-License-Identifier: Apache-2.0
"""The least energy that the exact work of one song takes on a GPU: its products and its reads, and nothing else.

    python -m tests.bench.bench_energy_gpu [--seconds 8] [--songs 96] [--tiny]

A card at its power limit is bound by joules, not by its peak. Measured are joules a TFLOP of bfloat16 products in the
shapes of the 2B DiT's MLP (two songs of 300 seconds), joules a GB read from memory, and both at once on two streams.
From these follows a floor for a guided song of 300 seconds with the 1.7B language model: the products of the DiT's 8
steps, of the VAE's decoder and of the LM, and what the LM reads (keys and values of two rows, and its weights once for
all ``--songs`` in flight). Norms, activations, attention's softmax, sampling and launches are left out. A line of JSON
each. ``--tiny`` tries the script out on a CPU, without energy.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self

import torch

_TOKENS: Final = 7_500
_HIDDEN: Final = 2_048
_MLP: Final = 6_144
_DIT_TFLOP: Final = 100.5
_VAE_TFLOP: Final = 36.6
"""Of one song of 300 s, counted from the shapes of products, convolutions and attention."""
_LM_PARAMETERS: Final = 1.45e9
"""Of the 1.7B model's layers and of its head's rows for codes."""
_CODES: Final = 1_500
_ROWS: Final = 2
_CONTEXT: Final = 1_000
_KV_BYTES: Final = 28 * 8 * 128 * 2 * 2
"""A token's keys and values: layers, heads, width, both, bfloat16."""
_SAMPLE_S: Final = 0.1


class Power:
    """The card's power and clock while a block runs; the first third is left out."""

    def __enter__(self) -> Self:
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"]
        command += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0")]
        while shutil.which(command[0]) and not self._stop.wait(_SAMPLE_S):
            line = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.splitlines()[
                0
            ]
            watts, clock = map(float, line.split(","))
            self._samples.append((watts, clock))

    def means(self) -> tuple[float, float]:
        """Return watts and MHz; not a number where there is no such card."""
        late = self._samples[len(self._samples) // 3 :] or [(float("nan"),) * 2]
        return statistics.fmean(each[0] for each in late), statistics.fmean(each[1] for each in late)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (8)")
    parser.add_argument("--songs", type=int, default=96, help="in flight in the language model (96)")
    parser.add_argument("--tiny", action="store_true", help="small tensors, on the CPU")
    asked = parser.parse_args()
    device, shrink = ("cpu", 64) if asked.tiny else ("cuda", 1)
    products = products_of(device, shrink)
    reads = reads_of(device, shrink)
    alone = tell("products", measure(asked.seconds, products=products))
    read = tell("reads", measure(asked.seconds, reads=reads))
    tell("both at once", measure(asked.seconds, products=products, reads=reads))
    floor = {
        "dit_j": _DIT_TFLOP * alone["joules"] / alone["tflop"],
        "vae_j": _VAE_TFLOP * alone["joules"] / alone["tflop"],
        "lm_products_j": 2 * _LM_PARAMETERS * _ROWS * _CODES / 1e12 * alone["joules"] / alone["tflop"],
        "lm_reads_j": lm_gb(asked.songs) * read["joules"] / read["gb"],
    }
    total = sum(floor.values())
    tell("floor of a song", {**floor, "joules": total, "songs_a_minute_at_these_watts": 60 * alone["watts"] / total})


def lm_gb(songs: int) -> float:
    """Return the GB that the language model reads for one song while so many are in flight."""
    return _CODES * (_ROWS * _CONTEXT * _KV_BYTES + 2 * _LM_PARAMETERS / songs) / 1e9


def products_of(device: str, shrink: int) -> Callable[[], float]:
    """Return what multiplies for a while, and says how many TFLOP that was."""
    tokens, hidden, mlp = _TOKENS // shrink, _HIDDEN // shrink, _MLP // shrink
    rows = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    up = torch.randn(hidden, mlp, device=device, dtype=torch.bfloat16) / hidden**0.5
    down = torch.randn(mlp, hidden, device=device, dtype=torch.bfloat16) / mlp**0.5

    def run() -> float:
        for _ in range(50):
            (rows @ up) @ down
        return 50 * 2 * 2 * tokens * hidden * mlp / 1e12

    return run


def reads_of(device: str, shrink: int) -> Callable[[], float]:
    """Return what reads for a while, and says how many GB that was."""
    values = torch.randn((1 << 31) // shrink**2, device=device)

    def run() -> float:
        for _ in range(4):
            values.amax()
        return 4 * values.nbytes / 1e9

    return run


def measure(
    seconds: float, products: Callable[[], float] | None = None, reads: Callable[[], float] | None = None
) -> dict[str, float]:
    """Run one of them, or each on a thread and a stream of its own; returns the work done and its energy."""
    found = {"tflop": 0.0, "gb": 0.0}
    kinds = [(name, run) for name, run in (("tflop", products), ("gb", reads)) if run is not None]
    with Power() as power:
        began = time.perf_counter()
        threads = [threading.Thread(target=_repeat, args=(run, seconds, name, found)) for name, run in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
    watts, clock = power.means()
    rates = {"tflop_a_s": found["tflop"] / took, "gb_a_s": found["gb"] / took}
    return {**found, **rates, "watts": watts, "mhz": clock, "joules": watts * took}


def _repeat(run: Callable[[], float], seconds: float, name: str, found: dict[str, float]) -> None:
    end = time.perf_counter() + seconds
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]  # torch's
    with torch.cuda.stream(stream), torch.inference_mode():
        while time.perf_counter() < end:
            found[name] += run()
            if stream is not None:
                stream.synchronize()


def tell(name: str, found: dict[str, Any]) -> dict[str, Any]:
    sys.stdout.write(json.dumps({"bench": "energy", "case": name, **{k: round(v, 2) for k, v in found.items()}}) + "\n")
    sys.stdout.flush()
    return found


if __name__ == "__main__":
    main()
