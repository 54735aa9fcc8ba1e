# SPDX-License-Identifier: Apache-2.0
"""Generates the tables of the documentation from the code: settings, tiers, exit codes, metrics, alerts.

``python -m infra.tables`` writes them between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->`` of each page.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from acestep_consumer.config.exit_codes import MEANINGS
from acestep_consumer.config.settings import describe_sections
from acestep_consumer.policy.tiers import BUILT_IN, NEWER, Tier, TierTable

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
DOCS: Final = ROOT / "infra/docs"
JAPANESE: Final = DOCS / "operations.ja.md"
ALERT_RULES: Final = ROOT / "infra/prometheus/alerts.yml"

# prometheus_client does not tell the labels of a metric that has no sample yet.
LABELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "acestep_build_info": "python, version",
        "acestep_engine_restarts": "engine",
        "acestep_job_errors": "code",
        "acestep_jobs": "state, model, tier",
        "acestep_publishes_refused": "reason",
        "acestep_ready": "check",
        "acestep_requests_sent_on": "tier",
        "acestep_stage_jobs": "stage",
        "acestep_stage_limit": "stage",
        "acestep_stage_seconds": "stage",
        "acestep_stage_waiting": "stage",
        "acestep_startup_seconds": "engine, phase",
    }
)

_JAPANESE_TIER_HEAD = (
    "ティア",
    "VRAM (GB)",
    "最大秒数 (LM あり / なし)",
    "最大バッチ (LM あり / なし)",
    "LM の既定",
    "使える LM",
)
_JAPANESE_TIER_WORDS = (
    ("| yes |", "| 読み込む |"),
    ("| no |", "| 読み込まない |"),
    (", or no GPU", "、または GPU なし"),
)
_JAPANESE_EXIT_CODES = (
    "正常終了",
    "ジョブが失敗またはキャンセルされたか、時間内に終わらず、または拒否され (`check`)、曲がない",
    "使い方または設定の誤り",
    "キューが満杯",
    "ブローカー・ストレージ・ワーカー・モデルのハブに接続できない",
    "エンジンを使用できない、またはモデルを完全に取得できない",
    "`doctor` がワーカーを起動できない問題を、または `models verify` が壊れたファイルを見つけた",
    "想定外のエラー。おそらくバグで、`ACESTEP_LOG_LEVEL=debug` で発生箇所が出る",
    "Ctrl-C で中断された",
    "出力を読むプログラム (`head` など) が終了した",
)


def settings_table() -> str:
    """Return the settings, a table for each section, one row per environment variable."""
    return "\n\n".join(f"### {title}\n\n{_settings(rows)}" for title, rows in describe_sections())


def tier_table(table: TierTable = BUILT_IN) -> str:
    """Return a tier table; by default the built-in one."""
    head = ("tier", "VRAM GB", "max seconds with / without LM", "max batch with / without LM", "LM by default", "LMs")
    return _table(head, (_tier_row(tier, table) for tier in table.tiers))


def japanese_tier_table() -> str:
    """Return the tier table in Japanese."""
    table = _table(_JAPANESE_TIER_HEAD, (_tier_row(tier, BUILT_IN) for tier in BUILT_IN.tiers))
    for english, japanese in _JAPANESE_TIER_WORDS:
        table = table.replace(english, japanese)
    return table


def exit_code_table() -> str:
    """Return the exit codes of the commands."""
    return _table(("exit code", "meaning"), ((f"{code:d}", meaning) for code, meaning in MEANINGS.items()))


def japanese_exit_code_table() -> str:
    """Return the exit codes in Japanese; a new code needs a new translation."""
    rows = ((f"{code:d}", meaning) for code, meaning in zip(MEANINGS, _JAPANESE_EXIT_CODES, strict=True))
    return _table(("終了コード", "意味"), rows)


def metrics_table() -> str:
    """Return the metrics of a worker, one row per family, by name."""
    # It composes a worker, which takes a second: the other tables do not.
    from tests.support.metrics_page import families_of_a_worker  # noqa: PLC0415

    families = asyncio.run(_in_loop(families_of_a_worker))
    rows = (
        (f"`{name}{_SUFFIX.get(family.type, '')}`", family.type, LABELS.get(name, "–"), family.documentation)
        for name, family in sorted(families.items())
    )
    return _table(("metric", "type", "labels", "meaning"), rows)


def alert_table() -> str:
    """Return the alert rules, in the order of their file."""
    return _table(
        ("alert", "severity", "summary"),
        (
            (f"`{rule['alert']}`", rule["labels"]["severity"], _plain(rule["annotations"]["summary"]))
            for rule in alert_rules()
        ),
    )


def alert_rules() -> list[dict[str, Any]]:
    """Return the rules of ``infra/prometheus/alerts.yml``, in their order."""
    groups = yaml.safe_load(ALERT_RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


PAGES: Final[Mapping[Path, Mapping[str, Callable[[], str]]]] = MappingProxyType(
    {
        README: {"tiers": tier_table},
        JAPANESE: {"tiers": japanese_tier_table, "exit codes": japanese_exit_code_table},
        DOCS / "operations.md": {"newer tiers": lambda: tier_table(NEWER), "exit codes": exit_code_table},
        DOCS / "settings.md": {"settings": settings_table},
        DOCS / "metrics.md": {"metrics": metrics_table, "alerts": alert_table},
    }
)
"""Which tables are on which page."""


def with_tables(page: Path) -> str:
    """Return the text of a page with its tables as they should be. Raises ``ValueError`` if a marker is missing."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (start and end):
            raise ValueError(f"{page}: no place for the table `{name}`")
        text = f"{before}{start}{table()}\n{end}{after}"
    return text


def main() -> None:
    """Update all pages."""
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")


_SUFFIX = {"counter": "_total"}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)).replace("| --- ", "|---")


def _settings(rows: Iterable[tuple[str, str, str]]) -> str:
    shown = ((f"`{name}`", default if default == "–" else f"`{default}`", about) for name, default, about in rows)
    return _table(("variable", "default", "meaning"), shown)


def _tier_row(tier: Tier, table: TierTable) -> tuple[str, ...]:
    return (
        tier.name,
        _size(tier, table),
        f"{tier.max_seconds_with_lm} / {tier.max_seconds}",
        f"{tier.max_batch_with_lm} / {tier.max_batch}",
        "yes" if tier.lm_by_default else "no",
        ", ".join(name.removeprefix("acestep-5Hz-lm-") for name in tier.lms) or "–",
    )


def _size(tier: Tier, table: TierTable) -> str:
    if tier is table.tiers[0]:
        return f"≤{tier.max_vram_gb:g}, or no GPU"
    if tier is table.tiers[-1]:
        return f">{table.tiers[-2].max_vram_gb:g}"
    return f"{'<' if tier.exclusive else '≤'}{tier.max_vram_gb:g}"


def _plain(summary: str) -> str:
    """Return an alert's summary without Prometheus' templates."""
    named = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"`\1`", summary)
    return re.sub(r"\{\{ \$value.*?\}\}", "N", named)


async def _in_loop(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return call()


if __name__ == "__main__":
    main()
