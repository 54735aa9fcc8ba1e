# SPDX-License-Identifier: Apache-2.0
"""Hypothesis without time limits for all unit tests: a busy machine is no fault of the code under test."""

from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
