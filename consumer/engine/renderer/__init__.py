# SPDX-License-Identifier: Apache-2.0
"""What runs inside the renderer process: ACE-Step 1.5 through diffusers, from a job and its plan to encoded songs.

Reading order: ``render`` (a job's way), ``arguments`` (job to pipeline arguments), ``lane`` (a pipeline per thread),
``randomness`` (where noise comes from), ``checkpoint`` and ``registry`` (models), ``device``, ``faults``, ``studio``
(start). Only ``report`` may be imported by the consumer process.
"""
