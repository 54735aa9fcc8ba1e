# SPDX-License-Identifier: Apache-2.0
"""Everything around the run of one job: context, attempt, cancellation, deadline, progress, scratch folder."""
