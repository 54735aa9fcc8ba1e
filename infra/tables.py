# SPDX-License-Identifier: Apache-2.0
"""Generates the tables of the docs from the code: ``python -m infra.tables``."""

import re
from pathlib import Path

from acestep_consumer.config.settings import describe
from acestep_consumer.policy.tiers import BUILT_IN, Tier

README = Path(__file__).parents[1] / "README.md"
JAPANESE = Path(__file__).parent / "README.ja.md"

_JAPANESE_HEAD = """\
| ティア | VRAM (GB) | 最大秒数 (LM あり / なし) | 最大バッチ (LM あり / なし) | LM の既定 | 使える LM |
|---|---|---|---|---|---|"""
_JAPANESE_WORDS = (("| yes |", "| 読み込む |"), ("| no |", "| 読み込まない |"), (", or no GPU", "、または GPU なし"))


def settings_table() -> str:
    """Return the settings, one row per environment variable."""
    rows = (f"| `{name}` | {_default(default)} | {about} |" for name, default, about in describe())
    return "\n".join(("| variable | default | meaning |", "|---|---|---|", *rows))


def tier_table() -> str:
    """Return the built-in tier table."""
    head = (
        "| tier | VRAM GB | max seconds with / without LM | max batch with / without LM | LM by default | LM models |"
    )
    return "\n".join((head, "|---|---|---|---|---|---|", *map(_tier, BUILT_IN.tiers)))


def japanese_tier_table() -> str:
    """Return the tier table in Japanese."""
    rows = "\n".join(tier_table().splitlines()[2:])
    for english, japanese in _JAPANESE_WORDS:
        rows = rows.replace(english, japanese)
    return f"{_JAPANESE_HEAD}\n{rows}"


def with_tables(text: str) -> str:
    """Return the README with current tables."""
    return _put(_put(text, "tiers", tier_table()), "settings", settings_table())


def main() -> None:
    """Update the README and the Japanese page."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    page = JAPANESE.read_text(encoding="utf-8")
    JAPANESE.write_text(_put(page, "tiers", japanese_tier_table()), encoding="utf-8")


def _default(value: str) -> str:
    return value if value == "–" else f"`{value}`"


def _tier(tier: Tier) -> str:
    seconds = f"{tier.max_seconds_with_lm} / {tier.max_seconds}"
    batch = f"{tier.max_batch_with_lm} / {tier.max_batch}"
    models = ", ".join(name.removeprefix("acestep-5Hz-lm-") for name in tier.lms) or "–"
    return f"| {tier.name} | {_size(tier)} | {seconds} | {batch} | {'yes' if tier.lm_by_default else 'no'} | {models} |"


def _size(tier: Tier) -> str:
    if tier is BUILT_IN.tiers[0]:
        return f"≤{tier.max_vram_gb:g}, or no GPU"
    if tier is BUILT_IN.tiers[-1]:
        return f">{BUILT_IN.tiers[-2].max_vram_gb:g}"
    return f"{'<' if tier.exclusive else '≤'}{tier.max_vram_gb:g}"


def _put(text: str, name: str, table: str) -> str:
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return block.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


if __name__ == "__main__":
    main()
