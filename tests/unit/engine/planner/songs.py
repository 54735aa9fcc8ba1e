# SPDX-License-Identifier: Apache-2.0
"""Strategies: everything that a song's metadata can be."""

from hypothesis import strategies as st

from acestep_consumer.engine.planner.metadata import Metadata
from acestep_schemas import coerce

# Words that no line of YAML or of the grammar has to break, of any script, with what YAML has to quote. No tags: the
# model may not write what could be one.
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="<>`"), min_size=1, max_size=16
)
CAPTIONS = st.lists(WORDS, min_size=1, max_size=40).map(" ".join)
KEYS = st.builds(
    "{}{} {}".format,
    st.sampled_from("ABCDEFG"),
    st.sampled_from(["", "#", "b", "♯", "♭"]),
    st.sampled_from(["major", "minor"]),
)
FIELDS = {
    "bpm": st.integers(30, 300),
    "caption": CAPTIONS,
    "duration": st.integers(10, 600),
    "keyscale": KEYS,
    "language": st.sampled_from(coerce.LANGUAGES),
    "timesignature": st.sampled_from(["2", "3", "4", "6"]),
}
WHOLE = st.builds(Metadata, **FIELDS)
"""All fields are known."""
PARTS = st.builds(Metadata, **{field: st.none() | values for field, values in FIELDS.items()})
"""Any of the fields are known, or none."""
