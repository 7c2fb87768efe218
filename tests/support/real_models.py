"""Networks that people run, from their packages: tiny, with random weights, nothing downloaded.

Input: the name of a network; output: the network, what calls it, and the shape of its input.
Packages are imported when a network is made: their warnings are none of ours.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
    "image_size": 32,
}


@dataclass(frozen=True)
class Network:
    """A network and how it is run.

    Attributes:
        model: in float32, on the CPU, as its class initialises it.
        call: from the model and its input to one tensor.
        shape: of the input.
    """

    model: nn.Module
    call: Callable[[Any, torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]


def plain(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x)


# ---- transformers ----


def sam() -> Network:
    from transformers import SamConfig, SamModel

    of_image = {"output_channels": 32, "global_attn_indexes": [1], "num_pos_feats": 16}
    of_heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32}
    config = SamConfig(
        vision_config=VIT | of_image,
        prompt_encoder_config={"hidden_size": 32, "image_size": 32, "patch_size": 8},
        mask_decoder_config=of_heads | {"mlp_dim": 32, "iou_head_hidden_dim": 16},
    )

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        points = torch.full((1, 1, 1, 2), 9.0, device=x.device, dtype=x.dtype)
        return model(pixel_values=x, input_points=points).pred_masks

    return Network(SamModel(config), call, (1, 3, 32, 32))


def beit() -> Network:
    from transformers import BeitConfig, BeitForSemanticSegmentation

    layers = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
    config = BeitConfig(**VIT | layers, use_auxiliary_head=False, num_labels=3)
    model = BeitForSemanticSegmentation(config)
    return Network(model, lambda model, x: model(x).logits, (1, 3, 32, 32))


def dpt() -> Network:
    from transformers import DPTConfig, DPTForDepthEstimation

    layers = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    sizes = {"neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8}
    model = DPTForDepthEstimation(DPTConfig(**VIT | layers | sizes))
    return Network(model, lambda model, x: model(x).predicted_depth, (1, 3, 32, 32))


def depth_anything() -> Network:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    layers = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "mlp_ratio": 2}
    backbone = Dinov2Config(**VIT | layers, reshape_hidden_states=False)
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    model = DepthAnythingForDepthEstimation(config)
    return Network(model, lambda model, x: model(x).predicted_depth, (1, 3, 32, 32))


def clipseg() -> Network:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = CLIPSegConfig(
        text_config=text | {"intermediate_size": 32, "eos_token_id": 19},
        vision_config=VIT | {"num_hidden_layers": 3},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        conditional_layer=0,
        use_complex_transposed_convolution=True,
    )

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        words = torch.tensor([[1, 2, 19]], device=x.device)
        return model(pixel_values=x, input_ids=words).logits

    return Network(CLIPSegForImageSegmentation(config), call, (1, 3, 32, 32))


def speecht5_hifigan() -> Network:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    return Network(SpeechT5HifiGan(config), plain, (2, 9, 8))


def encodec() -> Network:
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=4, hidden_size=16, codebook_dim=16, upsampling_ratios=[4, 2], num_lstm_layers=1
    )
    return Network(EncodecModel(config).decoder, plain, (1, 16, 7))


def dac() -> Network:
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=16,
        downsampling_ratios=[2, 4],
        upsampling_ratios=[4, 2],
        n_codebooks=2,
    )
    return Network(DacModel(config).decoder, plain, (1, config.hidden_size, 5))


def univnet() -> Network:
    from transformers import UnivNetConfig, UnivNetModel

    config = UnivNetConfig(
        model_in_channels=8,
        model_hidden_channels=8,
        num_mel_bins=8,
        resblock_stride_sizes=[4, 2],
        resblock_kernel_sizes=[3, 3],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        kernel_predictor_hidden_channels=8,
        kernel_predictor_num_blocks=1,
    )

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        noise = torch.linspace(-1, 1, 7 * 8, device=x.device, dtype=x.dtype).view(1, 7, 8)
        return model(x, noise).waveforms

    return Network(UnivNetModel(config), call, (1, 7, 8))


# ---- torchvision ----


def mask_rcnn() -> Network:
    """The branch for masks; the detector around it has no transposed convolution."""
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    branch = nn.Sequential(MaskRCNNHeads(8, (8, 8), 1), MaskRCNNPredictor(8, 8, 3))
    return Network(branch, plain, (3, 8, 7, 7))


def keypoint_rcnn() -> Network:
    """The branch for keypoints."""
    from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

    branch = nn.Sequential(KeypointRCNNHeads(8, (8, 8)), KeypointRCNNPredictor(8, 5))
    return Network(branch, plain, (2, 8, 7, 7))


# ---- MONAI ----


def monai_unet() -> Network:
    from monai.networks.nets import UNet

    model = UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1)
    return Network(model, plain, (1, 1, 8, 8, 8))


def dynunet() -> Network:
    from monai.networks.nets import DynUNet

    model = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])
    return Network(model, plain, (1, 1, 16, 16))


def vnet() -> Network:
    from monai.networks.nets import VNet

    return Network(VNet(spatial_dims=2, dropout_prob_down=None), plain, (1, 1, 16, 16))


def unetr() -> Network:
    from monai.networks.nets import UNETR

    model = UNETR(1, 2, 32, feature_size=4, hidden_size=16, mlp_dim=16, num_heads=2, spatial_dims=2)
    return Network(model, plain, (1, 1, 32, 32))


# ---- segmentation-models-pytorch ----


def linknet() -> Network:
    from segmentation_models_pytorch import Linknet

    return Network(Linknet("resnet18", encoder_weights=None), plain, (1, 3, 32, 32))


# ---- diffusers ----


def oobleck() -> Network:
    from diffusers import AutoencoderOobleck

    model = AutoencoderOobleck(8, [2, 4], [1, 2], 8, 4, 1)
    return Network(model.decoder, plain, (1, 4, 6))


def kandinsky() -> Network:
    """The blocks that upsample, of Kandinsky 3's U-Net."""
    from diffusers.models.unets.unet_kandinsky3 import Kandinsky3ResNetBlock

    model = Kandinsky3ResNetBlock(8, 8, 8, 4, 2, up_resolutions=[None, True, None, None])

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model(x, x.mean((2, 3)))

    return Network(model, call, (1, 8, 6, 6))


def stable_cascade() -> Network:
    from diffusers.models.unets import StableCascadeUNet

    model = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=8,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=8,
        clip_seq=1,
    )

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        ratio = x.new_tensor([0.3])
        return model(x, ratio, x.new_ones(1, 1, 8)).sample

    return Network(model, call, (1, 4, 8, 8))


# ---- kornia ----


def kornia_sam() -> Network:
    """The decoder of masks of Segment Anything."""
    from kornia.models.sam.architecture.mask_decoder import MaskDecoder
    from kornia.models.sam.architecture.transformer import TwoWayTransformer

    transformer = TwoWayTransformer(1, 16, 2, 16)
    model = MaskDecoder(transformer_dim=16, transformer=transformer, iou_head_hidden_dim=8)

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        sparse = x.new_ones(1, 2, 16)
        return model(x, x * 0.5, sparse, x * 0.1, multimask_output=True)[0]

    return Network(model, call, (1, 16, 4, 4))


def dexined() -> Network:
    from kornia.models.dexined import DexiNed

    return Network(DexiNed(pretrained=False), plain, (1, 3, 16, 16))


# ---- all ----

NETWORKS = {
    "transformers": (
        *(sam, beit, dpt, depth_anything, clipseg),
        *(speecht5_hifigan, encodec, dac, univnet),
    ),
    "torchvision": (mask_rcnn, keypoint_rcnn),
    "monai": (monai_unet, dynunet, vnet, unetr),
    "segmentation_models_pytorch": (linknet,),
    "diffusers": (oobleck, kandinsky, stable_cascade),
    "kornia": (kornia_sam, dexined),
}


def made(package: str, make: Callable[[], Network]) -> Network:
    """Return a network with seeded weights, of which none is too small to matter."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        declare_vision()
        importlib.import_module(package)
        torch.manual_seed(3)
        network = make()
    with torch.no_grad():
        for parameter in network.model.parameters():
            if parameter.dim() > 1:  # some start at 0.02 or at 0, and ReLU leaves nothing of it
                parameter.normal_(0, (parameter.numel() / len(parameter)) ** -0.5)
    network.model.eval()
    for module in network.model.modules():
        if isinstance(module, nn.RNNBase) and not module.dropout:
            module.train()  # the same numbers, but in evaluation cuDNN computes no gradients
    return network


@functools.cache
def declare_vision() -> None:
    """Declare the operators that torchvision's import needs, where its own cannot be loaded.

    Its wheel is built for CUDA, and beside a torch for the CPU it loads no operators. Networks
    without boxes need none.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _KEPT.append(library)  # what it declares goes with it
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_KEPT: list[Any] = []
