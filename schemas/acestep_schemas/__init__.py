# SPDX-License-Identifier: Apache-2.0
"""The contract on the wire: the request body that producers send and the events that subscribers hear."""
