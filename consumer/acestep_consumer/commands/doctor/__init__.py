# SPDX-License-Identifier: Apache-2.0
"""`acestep-consumer doctor`: checks the machine, broker, storage and models before a worker starts."""
