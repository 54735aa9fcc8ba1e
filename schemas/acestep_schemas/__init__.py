# SPDX-License-Identifier: Apache-2.0
"""The wire contract: the request body that producers send and the events that subscribers receive."""
