"""Weights for a model that has none installed: speed does not depend on what a network has learned.

Not quite any random weights will do. As initialised, the presence head says "absent" on every frame, temporal
embeddings (std 0.02) change nothing, layer scales (1e-6) silence the memory encoder, and memory attention is
so flat that a mirrored memory moves logits of 0.2 by 2e-3: masks would be empty, and a comparison with the
reference would compare nothing. With the gains below logits reach 10, as a trained network's do, and the
mirrored memory moves them by 2.4 (measured with sam2.1-hiera-tiny-512).
"""

from pathlib import Path

import torch
from torch import nn

from trocar_engines.network.config import network_config
from trocar_engines.network.sam2s import SAM2S
from trocar_engines.network.weights import save_weights

SEED = 7
PRESENT_LOGIT = 5.0
"""Bias of the presence head: every object is there."""
MASK_GAIN = 40.0
"""Of the weights that make a mask's channels from its token."""
MEMORY_GAIN = 4.0
"""Of what memory attention asks with, is asked with, and answers."""


def write_random_weights(model: str, path: Path) -> None:
    """Write weights that are finite, the same on every call, and under which objects are visible.

    Args:
        model: name of a network.
        path: of a safetensors file.

    Raises:
        UnknownModelError: no such network.
    """
    config = network_config(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        network = SAM2S(config)
        nn.init.constant_(network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, PRESENT_LOGIT)
        nn.init.normal_(network.maskmem_tpos_enc)
        for mlp in network.sam_mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(MASK_GAIN)
        for layer in network.memory_attention.layers:
            attention = layer.cross_attn_image
            for projection in (attention.q_proj, attention.k_proj, attention.out_proj):
                projection.weight.mul_(MEMORY_GAIN)
        for module in network.modules():
            gamma = getattr(module, "gamma", None)
            if isinstance(gamma, nn.Parameter):
                nn.init.ones_(gamma)
    save_weights(path, network.state_dict(), model)
