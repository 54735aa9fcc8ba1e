# SPDX-License-Identifier: Apache-2.0
"""The soak: whole workers under load while everything around them breaks, and an audit of what came of each job.

Reading order: `plan` (which faults, when: from a seed), `load` (the producer), `worker_slot` (a worker and its
proxies), `servers` (broker, store, slots), `faults` (the plan carried out), `audit` (pure: what must hold afterwards),
`report` (figures for people), `__main__` (the command).
"""
