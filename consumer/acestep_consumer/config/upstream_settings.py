# SPDX-License-Identifier: Apache-2.0
"""Settings of ACE-Step's own server that its ``.env`` file may hold: another name here, or no effect."""

from collections.abc import Mapping
from typing import Final

RENAMED: Final[Mapping[str, str]] = {"ACESTEP_CHECKPOINTS_DIR": "ACESTEP_CHECKPOINT_DIR"}
"""Name there -> name here, which counts where both are set."""

_NO_HTTP = "requests come from the broker, not over HTTP"
_NO_UI = "there is no Gradio interface"
_AT_START = "models are always loaded at the start"
_BY_ITSELF = "the worker decides this by itself"
_NO_MLX = "Apple's MLX is not used"
_ESTIMATE = "estimates come from the jobs that the workers have done"
_NO_TRAINING = "nothing is trained here"

WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "ACESTEP_AUTH_PASSWORD": _NO_UI,
    "ACESTEP_AUTH_USERNAME": _NO_UI,
    "ACESTEP_AVG_JOB_SECONDS": _ESTIMATE,
    "ACESTEP_AVG_WINDOW": _ESTIMATE,
    "ACESTEP_BATCH_SIZE": "ACESTEP_DEFAULT_BATCH_SIZE is the number of songs of a request that names none",
    "ACESTEP_COMPILE_MODEL": "ACESTEP_COMPILE is the setting here",
    "ACESTEP_DEBUG_STATS": "ACESTEP_LOG_LEVEL=debug and /metrics say how the models run",
    "ACESTEP_DISABLE_TQDM": "the log has no progress bars",
    "ACESTEP_DOWNLOAD_SOURCE": "models come from the Hugging Face hub, or another one that HF_ENDPOINT names",
    "ACESTEP_DTYPE": _BY_ITSELF,
    "ACESTEP_ENABLE_API": _NO_HTTP,
    "ACESTEP_EXTERNAL_AI_STORE_PASSPHRASE": _NO_UI,
    "ACESTEP_FEATURE_ADVANCED_EDITING": _NO_UI,
    "ACESTEP_FEATURE_API_TRAINING_ENDPOINTS": _NO_TRAINING,
    "ACESTEP_FEATURE_BATCH_GENERATION": _NO_UI,
    "ACESTEP_FEATURE_EXPERIMENTAL_SCORING": _NO_UI,
    "ACESTEP_FEATURE_LORA_TRAINING": _NO_TRAINING,
    "ACESTEP_FORCE_FLAC_EXPORT": "ACESTEP_DEFAULT_FORMAT is the format of a request that names none",
    "ACESTEP_INIT_TIMEOUT": _AT_START,
    "ACESTEP_MCP_API_BASE_URL": _NO_HTTP,
    "ACESTEP_MLX_VAE": _NO_MLX,
    "ACESTEP_MLX_VAE_CHUNK": _NO_MLX,
    "ACESTEP_MLX_VAE_ENCODE_SAMPLE": _NO_MLX,
    "ACESTEP_MLX_VAE_FP16": _NO_MLX,
    "ACESTEP_MODEL_CACHE": "ACESTEP_CHECKPOINT_DIR names the folder of models, and HF_HOME the cache of the hub",
    "ACESTEP_NO_INIT": _AT_START,
    "ACESTEP_PROJECT_ROOT": "ACESTEP_CHECKPOINT_DIR names the folder of models",
    "ACESTEP_ROCM_DTYPE": _BY_ITSELF,
    "ACESTEP_SAVE_MEMORY": "memory is planned by itself; see ACESTEP_OFFLOAD_TO_CPU",
    "ACESTEP_TASK_TIMEOUT_SECONDS": "ACESTEP_EXECUTION_TIMEOUT_S is the setting here",
    "ACESTEP_TMPDIR": "ACESTEP_SCRATCH_DIR is the setting here",
    "ACESTEP_USE_FLASH_ATTENTION": _BY_ITSELF,
    "ACESTEP_USE_MLX_DIT": _NO_MLX,
    "ACESTEP_VAE_CHECKPOINT": "the VAE is the one in the folder of models",
    "ACESTEP_VAE_DECODE_CHUNK_SIZE": _BY_ITSELF,
    "ACESTEP_VAE_ENCODE_SAMPLE": _BY_ITSELF,
    "ACESTEP_VAE_MIN_FREE_GB": _BY_ITSELF,
    "ACESTEP_VAE_ON_CPU": _BY_ITSELF,
}
"""Variable -> why it has no effect, and what has."""
