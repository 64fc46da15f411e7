"""Frozen descriptions of every network Trocar can build, by name."""

from dataclasses import dataclass

from trocar_engines.errors import UnknownModelError

INSTRUMENT_CLASSES = ("grasper", "scissors", "hook", "clip_applier", "suction", "needle_driver", "tissue")
"""What the temporal semantic head of the shipped weights tells apart; the order is that of its vectors."""


@dataclass(frozen=True, kw_only=True)
class HieraConfig:
    """The Hiera trunk of SAM 2 (arXiv 2408.00714, appendix C); defaults are those of base-plus."""

    embed_dim: int = 112
    num_heads: int = 2
    stages: tuple[int, ...] = (2, 3, 16, 3)
    global_att_blocks: tuple[int, ...] = (12, 16, 20)
    window_pos_embed_bkg_spatial_size: tuple[int, int] = (14, 14)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at stride 32, 16, 8, 4."""
        return tuple(self.embed_dim * 2**stage for stage in (3, 2, 1, 0))


@dataclass(frozen=True, kw_only=True)
class ConvTrunkConfig:
    """A small convolutional trunk; see `trunk.ConvTrunk`.

    Args:
        stem: channels at stride 2.
        widths: channels at stride 4, 8, 16, 32.
        depths: residual blocks at stride 4, 8, 16, 32.
        expansion: width of a block's inside over its outside.
    """

    stem: int = 16
    widths: tuple[int, int, int, int] = (32, 64, 96, 160)
    depths: tuple[int, int, int, int] = (0, 1, 4, 3)
    expansion: int = 3

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at stride 32, 16, 8, 4."""
        return tuple(reversed(self.widths))


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that decides the shape of a SAM2S network.

    Args:
        trunk: the image encoder's backbone.
        input_size_px: side of the square input picture.
        d_model: channels of image embeddings, object pointers and decoder tokens.
        d_memory: channels of spatial memory.
        memory_layers: layers of memory attention.
        memory_mlp: hidden width of memory attention's feed-forward part.
        memory_fuser_layers: ConvNeXt blocks of the memory encoder.
        memory_stride: stride of the spatial memory that is kept; 16 is SAM 2's. At 32 every memory token is
            the mean of 2x2, a quarter of the keys to attend to.
        memory_mask_stride: what the memory encoder's mask branch reduces by: 16 reads the mask at input
            size as SAM 2 does, 4 reads the decoder's own mask resolution.
        fpn_top_down_levels: pyramid levels that receive top-down features.
        decoder_mlp: hidden width of the mask decoder's feed-forward part.
        decoder_heads: attention heads of the mask decoder.
        num_maskmem: size of the temporal embedding table of recent frames (SAM 2: 7).
        has_long_term_embedding: own temporal embeddings for long-term and correction slots (SAM2S).
        readout_dim: channels of the affinity readout's keys; 0 builds none.
        classes: what the temporal semantic head tells apart; empty builds none.
    """

    trunk: HieraConfig | ConvTrunkConfig
    input_size_px: int
    d_model: int = 256
    d_memory: int = 64
    memory_layers: int = 4
    memory_mlp: int = 2048
    memory_fuser_layers: int = 2
    memory_stride: int = 16
    memory_mask_stride: int = 16
    fpn_top_down_levels: tuple[int, ...] = (2, 3)
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    num_maskmem: int = 7
    has_long_term_embedding: bool = False
    readout_dim: int = 0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.input_size_px % 32:
            raise ValueError(f"input_size_px {self.input_size_px}: must be a multiple of 32")
        if self.d_model % self.d_memory:
            raise ValueError(f"d_model {self.d_model}: must be a multiple of d_memory {self.d_memory}")

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding, stride 16."""
        return self.input_size_px // 16

    @property
    def memory_size(self) -> int:
        """Side of a spatial memory."""
        return self.input_size_px // self.memory_stride

    @property
    def mask_size(self) -> int:
        """Side of the decoder's mask logits, stride 4."""
        return self.input_size_px // 4

    @property
    def prototypes(self) -> int:
        """Prototypes of a remembered picture, see `readout.AffinityReadout`."""
        return self.embedding_size**2 * 5 // 4 if self.readout_dim else 0

    @property
    def tokens_per_pointer(self) -> int:
        """An object pointer is split into this many memory tokens."""
        return self.d_model // self.d_memory


_TINY = HieraConfig(
    embed_dim=96,
    num_heads=1,
    stages=(1, 2, 7, 2),
    global_att_blocks=(5, 7, 9),
    window_pos_embed_bkg_spatial_size=(7, 7),
)
_SMALL = HieraConfig(
    embed_dim=96,
    num_heads=1,
    stages=(1, 2, 11, 2),
    global_att_blocks=(7, 10, 13),
    window_pos_embed_bkg_spatial_size=(7, 7),
)
_BASE_PLUS = HieraConfig()
_LARGE = HieraConfig(
    embed_dim=144,
    num_heads=2,
    stages=(2, 6, 36, 4),
    global_att_blocks=(23, 33, 43),
    window_pos_embed_bkg_spatial_size=(7, 7),
    window_spec=(8, 4, 16, 8),
)
_HIERA = {"tiny": _TINY, "small": _SMALL, "base-plus": _BASE_PLUS, "large": _LARGE}

NANO = NetworkConfig(
    trunk=ConvTrunkConfig(),
    input_size_px=256,
    d_model=64,
    d_memory=32,
    memory_layers=1,
    memory_mlp=256,
    memory_fuser_layers=1,
    memory_stride=32,
    memory_mask_stride=4,
    fpn_top_down_levels=(1, 2, 3),
    decoder_mlp=256,
    decoder_heads=4,
    has_long_term_embedding=True,
    readout_dim=24,
    classes=INSTRUMENT_CLASSES,
)


def _hiera_networks() -> dict[str, NetworkConfig]:
    networks = {}
    for size, trunk in _HIERA.items():
        for pixels, suffix in ((1024, ""), (512, "-512")):
            networks[f"sam2.1-hiera-{size}{suffix}"] = NetworkConfig(trunk=trunk, input_size_px=pixels)
        networks[f"sam2s-hiera-{size}"] = NetworkConfig(
            trunk=trunk, input_size_px=512, has_long_term_embedding=True, classes=INSTRUMENT_CLASSES
        )
    return networks


NETWORKS: dict[str, NetworkConfig] = {"sam2s-nano": NANO, **_hiera_networks()}


def network_config(name: str) -> NetworkConfig:
    """The configuration called `name`.

    Raises:
        UnknownModelError: there is none; the message lists those there are.
    """
    try:
        return NETWORKS[name]
    except KeyError:
        raise UnknownModelError(f"model {name!r}: expected one of {', '.join(NETWORKS)}") from None
