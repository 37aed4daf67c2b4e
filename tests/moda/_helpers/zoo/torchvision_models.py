"""Classifiers, segmentation heads and video models of torchvision: shallow or narrow where their constructors allow, on
small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import convnext, densenet, efficientnet, mobilenetv3, regnet, resnet, segmentation, vgg
from torchvision.models.maxvit import MaxVit
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.video import mvit
from torchvision.models.video import resnet as video
from torchvision.models.video.s3d import S3D
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.models.vision_transformer import VisionTransformer

from tests.moda._helpers.zoo.entry import CLASSES, Entry, images, vectors

Build = Callable[[], nn.Module]


def _named(name: str, **settings: Any) -> Build:
    """The model that torchvision knows by this name."""
    return partial(models.get_model, name, weights=None, num_classes=CLASSES, **settings)


def _resnet(block: Any, *layers: int, **settings: Any) -> Build:
    return partial(resnet.ResNet, block, layers or (1, 1, 1, 1), num_classes=CLASSES, **settings)


def _vgg(batch_norm: bool) -> nn.Module:
    plan: list[Any] = [16, "M", 24, 24, "M", 32, 32, "M"]
    with torch.device("meta"):  # its classifier of 120 million parameters is replaced
        model = vgg.VGG(nn.Identity(), num_classes=CLASSES, init_weights=False)
    model.features, model.avgpool = vgg.make_layers(plan, batch_norm=batch_norm), nn.AdaptiveAvgPool2d(2)
    return _with_small_classifier(model, (0, 3, 6), 128)


def _alexnet() -> nn.Module:
    with torch.device("meta"):
        model = models.alexnet(num_classes=CLASSES)
    model.features, model.avgpool = model.features.to_empty(device="cpu"), nn.AdaptiveAvgPool2d(1)
    for module in model.features.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return _with_small_classifier(model, (1, 4, 6), 256)


def _with_small_classifier(model: Any, places: tuple[int, int, int], inputs: int) -> nn.Module:
    for place, (source, target) in zip(places, ((inputs, 48), (48, 48), (48, CLASSES)), strict=True):
        model.classifier[place] = nn.Linear(source, target)
    return model


def _s3d() -> nn.Module:
    model = S3D(num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool3d(1)
    return model


def _densenet(**settings: Any) -> nn.Module:
    return densenet.DenseNet(8, (2, 3, 2, 2), 16, num_classes=CLASSES, **settings)


def _efficientnet() -> nn.Module:
    block = partial(efficientnet.MBConvConfig, width_mult=0.5)
    stages = [
        block(1, 3, 1, 32, 16, 1),
        block(6, 3, 2, 16, 24, 2),
        block(6, 5, 2, 24, 40, 2),
        block(6, 3, 2, 40, 64, 1),
    ]
    return efficientnet.EfficientNet(stages, dropout=0.2, num_classes=CLASSES, last_channel=128)


def _efficientnet_v2() -> nn.Module:
    fused, plain = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    stages = [
        fused(1, 3, 1, 16, 16, 1),
        fused(4, 3, 2, 16, 24, 2),
        plain(4, 3, 2, 24, 32, 2),
        plain(6, 3, 1, 32, 40, 1),
    ]
    return efficientnet.EfficientNet(stages, dropout=0.2, num_classes=CLASSES, last_channel=128)


def _convnext() -> nn.Module:
    stages = [convnext.CNBlockConfig(16, 24, 1), convnext.CNBlockConfig(24, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    return convnext.ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=CLASSES)


def _mobilenet_v3(kind: str) -> nn.Module:
    settings, _ = mobilenetv3._mobilenet_v3_conf(kind, width_mult=0.5)
    return mobilenetv3.MobileNetV3(settings[:7], 64, num_classes=CLASSES)


def _regnet(se_ratio: float | None) -> nn.Module:
    settings = regnet.BlockParams.from_init_params(depth=5, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=se_ratio)
    return regnet.RegNet(settings, num_classes=CLASSES, stem_width=8)


def _swin(block: Any, **settings: Any) -> nn.Module:
    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [2, 2], stochastic_depth_prob=0.1, num_classes=CLASSES, block=block, **settings
    )


def _maxvit() -> nn.Module:
    return MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=CLASSES)


def _video(makers: list[Any], stem: Any = video.BasicStem) -> Build:
    return partial(video.VideoResNet, video.BasicBlock, makers, [1, 1, 1, 1], stem, num_classes=CLASSES)


def _mvit() -> nn.Module:
    def block(heads: int, channels: tuple[int, int], stride: int) -> mvit.MSBlockConfig:
        return mvit.MSBlockConfig(heads, *channels, [3, 3, 3], [3, 3, 3], [1, stride, stride], [1, 2, 2])

    blocks = [block(1, (16, 16), 1), block(2, (16, 32), 2), block(2, (32, 32), 1)]
    return mvit.MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=CLASSES,
    )


def _segmentation(head: str) -> nn.Module:
    """A segmentation model over a shallow ResNet, with an auxiliary output."""
    trunk = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    layers = models._utils.IntermediateLayerGetter(trunk, {"layer4": "out", "layer3": "aux"})
    auxiliary = segmentation.fcn.FCNHead(256, CLASSES)
    if head == "fcn":
        return segmentation.FCN(layers, segmentation.fcn.FCNHead(512, CLASSES), auxiliary)
    return segmentation.DeepLabV3(layers, segmentation.deeplabv3.DeepLabHead(512, CLASSES, (2, 3, 4)), auxiliary)


_BASIC, _BOTTLENECK = resnet.BasicBlock, resnet.Bottleneck
_2D = {
    "alexnet": (_alexnet, 64),
    "convnext": (_convnext, 32),
    "densenet": (_densenet, 32),
    "densenet_memory_efficient": (partial(_densenet, memory_efficient=True), 32),
    "densenet121": (_named("densenet121"), 32),
    "efficientnet": (_efficientnet, 32),
    "efficientnet_b0": (_named("efficientnet_b0"), 32),
    "efficientnet_v2": (_efficientnet_v2, 32),
    "googlenet": (_named("googlenet", aux_logits=False, init_weights=False), 32),
    "inception_v3": (_named("inception_v3", aux_logits=False, init_weights=False), 75),
    "maxvit": (_maxvit, 32),
    "mnasnet": (_named("mnasnet0_5"), 32),
    "mobilenet_v2": (_named("mobilenet_v2", width_mult=0.25), 32),
    "mobilenet_v3_large": (partial(_mobilenet_v3, "mobilenet_v3_large"), 32),
    "mobilenet_v3_small": (partial(_mobilenet_v3, "mobilenet_v3_small"), 32),
    "regnet_x": (partial(_regnet, None), 32),
    "regnet_y": (partial(_regnet, 0.25), 32),
    "resnet18": (_named("resnet18"), 32),
    "resnet_bottleneck": (_resnet(_BOTTLENECK), 32),
    "resnet_dilated": (_resnet(_BOTTLENECK, replace_stride_with_dilation=[False, True, True]), 32),
    "resnext": (_resnet(_BOTTLENECK, groups=8, width_per_group=4), 32),
    "shufflenet_v2": (partial(ShuffleNetV2, [2, 2, 2], [8, 16, 32, 48, 64], num_classes=CLASSES), 32),
    "squeezenet1_0": (_named("squeezenet1_0"), 48),
    "squeezenet1_1": (_named("squeezenet1_1"), 48),
    "swin": (partial(_swin, SwinTransformerBlock), 32),
    "swin_v2": (partial(_swin, SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 32),
    "vgg": (partial(_vgg, False), 32),
    "vgg_bn": (partial(_vgg, True), 32),
    "vit": (partial(VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=CLASSES), 32),
    "resnet_group_norm": (_resnet(_BASIC, 1, 1, 1, 1, norm_layer=partial(nn.GroupNorm, 4)), 32),
}  # fmt: skip
_VIDEO: dict[str, Build] = {
    "r3d": _video([video.Conv3DSimple] * 4),
    "mc3": _video([video.Conv3DSimple, *[video.Conv3DNoTemporal] * 3]),
    "r2plus1d": _video([video.Conv2Plus1D] * 4, video.R2Plus1dStem),
    "mvit": _mvit,
    "swin3d": partial(SwinTransformer3d, [2, 4, 4], 16, [1, 1], [2, 2], [2, 2, 2], num_classes=CLASSES),
}


def entries() -> list[Entry]:
    """Every model of torchvision in the zoo."""
    made = [Entry(name, "torchvision", build, images(size)) for name, (build, size) in _2D.items()]
    made += [Entry(name, "torchvision", build, vectors(3, 4, 32, 32)) for name, build in _VIDEO.items()]
    made += [Entry("s3d", "torchvision", _s3d, vectors(3, 8, 32, 32))]
    made += [
        Entry(head, "torchvision", partial(_segmentation, head), images(32), output="out")
        for head in ("fcn", "deeplabv3")
    ]
    googlenet = _named("googlenet", aux_logits=True, init_weights=False)
    made += [Entry("googlenet_auxiliary", "torchvision", googlenet, images(32), output=0)]
    return made
