# SPDX-License-Identifier: Apache-2.0
"""The planner process: ACE-Step 1.5's 5Hz language model fills in the parts of a song that a request leaves open.

Reading order. A job: ``service`` (requests), ``planning`` (phases of one job), ``prompts``, ``description_hints``,
``grammar``, ``metadata``, ``tokens``. The model: ``engine_loop`` (steps a backend), ``backend`` (the interface),
``sequence``, ``guidance`` (logits to tokens), ``token_masks`` (grammars). On transformers: ``transformers_backend``,
``row_cache``, ``row_table``. On vLLM: ``vllm_backend``, ``vllm_engine``, ``vllm_worker``, ``vllm_guidance``,
``vllm_sequence``, ``vllm_int8``, ``vllm_versions``. Start: ``loading``, ``registry``.
"""
