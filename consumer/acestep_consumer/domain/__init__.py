# SPDX-License-Identifier: Apache-2.0
"""Types of the domain: job, errors, outcome, and the ports that adapters implement."""
