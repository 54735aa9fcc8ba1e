# SPDX-License-Identifier: Apache-2.0
"""Golden cases where this worker departs from the original ACE-Step on purpose; tests hold its own values."""

from typing import Final

KEPT_AT_THEIR_LEVEL: Final = (
    *("lego_base_window", "repaint_base_balanced_0.2", "repaint_base_balanced_0.5", "repaint_base_balanced_0.9"),
    *("repaint_base_explicit_balanced", "repaint_base_outpaint_right", "repaint_turbo_balanced_0.2"),
    *("repaint_turbo_balanced_0.5", "repaint_turbo_balanced_0.9", "repaint_turbo_conservative", "repaint_turbo_dcw"),
    *("repaint_turbo_default_flac", "repaint_turbo_explicit_balanced", "repaint_turbo_from_start"),
    *("repaint_turbo_outpaint_left", "repaint_turbo_outpaint_right", "repaint_turbo_to_end"),
)
"""The original scales the samples that it keeps of the source with the rest; here they stay the source's."""

END_BEFORE_START: Final = "repaint_turbo_end_before_start"
"""The original makes a whole song and then puts nearly all of the source back over it; here the new song stays."""

NAMED_LENGTHS: Final = {"codes_turbo_short": 2, "codes_with_source": 8}
"""Seconds of codes without a duration. The original's prompt says 30 whatever they are; here it says their length."""

OWN_POSTERIORS: Final = "reference_batch2"
"""The original draws the reference's latents once for a batch; here each song draws them from its own seed."""

DEPARTURES: Final = frozenset({*KEPT_AT_THEIR_LEVEL, END_BEFORE_START, *NAMED_LENGTHS, OWN_POSTERIORS})
