"""Networks small enough for unit tests, and runtimes made of them."""

import dataclasses

import torch
from torch import nn

from trocar_engines.network.config import NANO, ConvTrunkConfig, NetworkConfig
from trocar_engines.network.sam2s import SAM2S

TINY = dataclasses.replace(
    NANO,
    trunk=ConvTrunkConfig(stem=8, widths=(8, 16, 16, 16), depths=(0, 0, 1, 1), expansion=2),
    input_size_px=64,
    d_model=32,
    d_memory=16,
    memory_mlp=32,
    decoder_mlp=32,
    readout_dim=8,
)


def lively_network(config: NetworkConfig = TINY, seed: int = 0) -> SAM2S:
    """A network with random weights whose outputs are not vacuous.

    With a plain initialisation the presence score is negative and every mask reads "absent", temporal
    embeddings (std 0.02) change nothing and layer scales (1e-6) silence the memory encoder.
    """
    torch.manual_seed(seed)
    network = SAM2S(config)
    with torch.no_grad():
        network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
        network.maskmem_tpos_enc.normal_()
        if config.readout_dim:
            network.sam_mask_decoder.refiner.adjust.weight.normal_(0, 0.1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            gamma = getattr(module, "gamma", None)
            if isinstance(gamma, nn.Parameter):
                gamma.fill_(1.0)
    return network.eval().requires_grad_(False)
