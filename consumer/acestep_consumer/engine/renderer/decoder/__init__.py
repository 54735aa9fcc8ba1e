# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder: ``vae_decode`` (windows of many songs), and on Hopper ``fused_decoder`` with ``decoder_kernels``."""
