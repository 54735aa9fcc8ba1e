# SPDX-License-Identifier: Apache-2.0
"""A broker that shows its metrics to Prometheus, as the one of docker-compose.yml does."""

from pathlib import Path
from typing import Any
from urllib.request import urlopen

from infra.local.ports import LOOPBACK, PortClaim
from infra.local.rabbitmq import RabbitMQ


class MeasuredRabbitMQ(RabbitMQ):
    """RabbitMQ with its Prometheus plugin on a free port."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._metrics_claim = PortClaim(1)

    def page(self, path: str) -> str:
        """Return one of the plugin's pages."""
        with urlopen(f"http://{LOOPBACK}:{self._metrics_claim.ports[0]}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        super().close()
        self._metrics_claim.release()

    def _write_files(self) -> None:
        super()._write_files()
        with (self.folder / "rabbitmq.conf").open("a") as configuration:
            port = self._metrics_claim.ports[0]
            configuration.write(f"prometheus.tcp.ip = {LOOPBACK}\nprometheus.tcp.port = {port}\n")
        (self.folder / "enabled_plugins").write_text("[rabbitmq_prometheus].\n")
