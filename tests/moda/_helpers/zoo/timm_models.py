"""Classifiers of timm: a model or two of nearly every family, with settings that make it small, on small images.

timm lies beside the environment, as torchvision does (tests/conftest.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from tests.moda._helpers.zoo.entry import CLASSES, Entry, images

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}
_WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
_FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
_METAFORMER = {"depths": (1, 1, 1), "dims": (16, 24, 32)}
_TWINS = {"embed_dims": (16, 24, 32, 40), "num_heads": (1, 2, 2, 2)}

# Name in timm: size of its images, settings.
_BY_NAME: dict[str, tuple[int, Mapping[str, Any]]] = {
    "beit_base_patch16_224": (32, _VIT),
    "beitv2_base_patch16_224": (32, _VIT),
    "botnet26t_256": (64, {"img_size": 64}),
    "cait_xxs24_224": (32, _VIT),
    "coat_lite_tiny": (32, {"img_size": 32}),
    "coatnet_pico_rw_224": (32, {"img_size": 32}),
    "convit_tiny": (32, {**_VIT, "depth": 4, "local_up_to_layer": 2}),
    "convnext_atto": (32, _FOUR),
    "convnextv2_atto": (32, _FOUR),
    "cs3darknet_focus_s": (32, {}),
    "cs3darknet_s": (32, {}),
    "cspnext_tiny": (32, {"depths": (1, 1, 1, 1), "channels": (16, 32, 48, 64)}),
    "davit_tiny": (32, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)}),
    "deit3_small_patch16_224": (32, _VIT),
    "deit_tiny_distilled_patch16_224": (32, _VIT),
    "densenetblur121d": (32, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "dla34": (32, {"channels": (8, 8, 16, 16, 24, 32)}),
    "dla46x_c": (32, {}),
    "dla60_res2net": (32, {"channels": (8, 8, 16, 16, 24, 32)}),
    "dpn68": (32, {"k_sec": (1, 1, 1, 1)}),
    "eca_resnet33ts": (32, {"width_factor": 0.25}),
    "ecaresnet26t": (32, _RESNET),
    "edgenext_xx_small": (64, {"dims": (16, 24, 32, 40), "depths": (2, 2, 2, 2)}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40)}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "efficientnet_es": (32, {}),
    "efficientnet_lite0": (32, {}),
    "efficientvim_m1": (64, {"embed_dim": (16, 24, 32), "depths": (1, 1, 1)}),
    "efficientvit_b0": (32, {}),
    "efficientvit_m0": (64, {"img_size": 64, "window_size": (4, 4, 4)}),
    "ese_vovnet19b_slim": (32, {}),
    "ese_vovnet19b_slim_dw": (32, {}),
    "eva02_tiny_patch14_224": (28, {**_VIT, "img_size": 28, "patch_size": 14}),
    "fasternet_t0": (32, {"depths": (1, 1, 1, 1), "embed_dim": 16}),
    "fastvit_t8": (32, {"layers": (1, 1, 1, 1)}),
    "fbnetv3_b": (32, {"channel_multiplier": 0.25}),
    "flexivit_small": (32, _VIT),
    "gcresnet33ts": (32, {"width_factor": 0.25}),
    "ghostnet_050": (32, {}),
    "ghostnetv2_100": (64, {}),
    "gmlp_ti16_224": (32, {"img_size": 32}),
    "hgnetv2_b0": (32, {}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "hrnet_w18_small": (32, {}),
    "inception_next_atto": (32, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}),
    "lambda_resnet26t": (64, {"width_factor": 0.25}),
    "lcnet_050": (32, {}),
    "lcnetv2_base": (32, {"scale": 0.25}),
    "levit_128s": (32, {"img_size": 32, "embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 2, 2)}),
    "mambaout_femto": (32, _FOUR),
    "maxvit_pico_rw_256": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "mnasnet_small": (32, {}),
    "mobilenet_edgetpu_v2_xs": (32, {}),
    "mobilenetv1_100": (32, {}),
    "mobilenetv2_050": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "mobilenetv4_conv_small_050": (32, {}),
    "mobileone_s0": (32, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {"img_size": (64, 64)}),
    "naflexvit_base_patch16_gap": (32, {"embed_dim": 24, "depth": 2, "num_heads": 2}),
    "nf_regnet_b0": (32, {}),
    "nf_resnet26": (32, {"depths": (1, 1, 1, 1), "channels": (32, 32, 64, 64)}),
    "pit_ti_224": (64, {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 2, 2)}),
    "pvt_v2_b0": (32, {"depths": (1, 1, 1, 1)}),
    "rdnet_tiny": (32, {"growth_rates": (8,) * 7}),
    "regnetx_002": (32, {}),
    "regnety_002": (32, {}),
    "repghostnet_050": (32, {}),
    "repvgg_a0": (32, {}),
    "repvit_m0_9": (32, {"embed_dim": (16, 24, 32, 40), "depth": (1, 1, 1, 1)}),
    "res2net50_48w_2s": (32, _RESNET),
    "resnest14d": (32, _RESNET),
    "resnet26d": (32, _RESNET),
    "resnetblur50": (32, _RESNET),
    "resnetrs50": (32, _RESNET),
    "resnetv2_50": (32, {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64)}),
    "rexnet_100": (32, {"width_mult": 0.5}),
    "samvit_base_patch16": (32, {**_VIT, "global_attn_indexes": (1,)}),
    "semnasnet_050": (32, {}),
    "sequencer2d_s": (32, {"img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (16, 24, 24, 24), "hidden_sizes": (8,) * 4}),
    "seresnextaa101d_32x8d": (32, _RESNET),
    "shvit_s1": (64, {"embed_dim": (16, 24, 32), "partial_dim": (8, 8, 8), "depth": (1, 1, 1)}),
    "skresnet18": (32, _RESNET),
    "starnet_s050": (32, {"depths": (1, 1, 1, 1)}),
    "swiftformer_xs": (64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 24, 32)}),
    "swin_tiny_patch4_window7_224": (32, _WINDOWS),
    "swinv2_cr_tiny_ns_224": (32, _WINDOWS),
    "swinv2_tiny_window8_256": (32, _WINDOWS),
    "test_efficientnet_evos": (32, {}),
    "test_efficientnet_gn": (32, {}),
    "test_nfnet": (32, {}),
    "test_vit2": (32, {}),
    "tiny_vit_5m_224": (64, {**_TWINS, "depths": (1, 1, 1, 1), "window_sizes": (4, 4, 4, 2)}),
    "tinynet_e": (32, {}),
    "tnt_s_patch16_224": (32, {"img_size": 32, "embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2}),
    "tresnet_m": (32, {"layers": (1, 1, 1, 1)}),
    "twins_pcpvt_small": (32, {**_TWINS, "img_size": 32, "depths": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {**_TWINS, "img_size": 64, "depths": (1, 1, 1, 2)}),
    "visformer_tiny": (64, {"img_size": 64, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2}),
    "vit_base_patch16_rope_reg1_gap_256": (32, _VIT),
    "vit_base_patch16_xp_224": (32, _VIT),
    "vit_dwee_patch16_reg1_gap_256": (32, _VIT),
    "vit_pe_core_tiny_patch16_384": (32, _VIT),
    "vit_relpos_small_patch16_224": (32, _VIT),
    "vit_so150m_patch16_reg4_map_256": (32, _VIT),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}),
}  # fmt: skip


# Families whose functions by name allow no smaller model: module, class, size of images, settings; a setting that is
# text with a dot names something in timm.
_BY_CLASS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "convformer": ("metaformer.MetaFormer", 32, {**_METAFORMER, "token_mixers": "metaformer.SepConv"}),
    "convmixer": ("convmixer.ConvMixer", 32, {"dim": 16, "depth": 2}),
    "crossvit": ("crossvit.CrossVit", 32, {"img_size": 32, "embed_dim": (16, 32), "num_heads": (2, 2)}),
    "focalnet": ("focalnet.FocalNet", 32, {"embed_dim": 16, "depths": (1, 1), "focal_levels": (2, 2), "focal_windows": (3, 3)}),
    "gcvit": (
        "gcvit.GlobalContextVit",
        64,
        {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_ratio": (16, 16)},
    ),
    "mlp_mixer": ("mlp_mixer.MlpMixer", 32, {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}),
    "nest": (
        "nest.Nest",
        32,
        {"img_size": 32, "num_levels": 2, "embed_dims": (16, 24), "num_heads": (2, 2), "depths": (1, 1)},
    ),
    "poolformer": ("metaformer.MetaFormer", 32, {**_METAFORMER, "token_mixers": "metaformer.Pooling"}),
    "resmlp": (
        "mlp_mixer.MlpMixer",
        32,
        {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16, "mlp_ratio": 4, "block_layer": "mlp_mixer.ResBlock"},
    ),
}  # fmt: skip


def _by_name(name: str, settings: Mapping[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)


def _by_class(path: str, settings: Mapping[str, Any]) -> nn.Module:
    made = {key: _resolved(value) for key, value in settings.items()}
    return _resolved(path)(num_classes=CLASSES, **made)


def _resolved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_resolved, value))
    if not (isinstance(value, str) and "." in value):
        return value
    module, name = value.split(".")
    return getattr(importlib.import_module(f"timm.models.{module}"), name)


def entries() -> list[Entry]:
    """Every model of timm in the zoo."""
    made = [
        Entry(name, "timm", partial(_by_name, name, settings), images(size))
        for name, (size, settings) in _BY_NAME.items()
    ]
    made += [
        Entry(name, "timm", partial(_by_class, path, settings), images(size))
        for name, (path, size, settings) in _BY_CLASS.items()
    ]
    return made
