"""The models of the zoo: how each is built, with random weights, and what it is called with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.pictures import PICTURES
from benchmarks.zoo.probe import Specimen, warm
from benchmarks.zoo.text import DECODERS, ENCODER_DECODERS, ENCODERS, Tiny

TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
]
"""The smallest of every family, and a further one where variants are built differently."""

TIMM = [
    "halonet_h1",
    "test_byobnet",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "test_convnext",
    "cpubone_nano",
    "crossvit_tiny_240",
    "csatv2",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilenetv2_035",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_v3",
    "lcnetv2_small",
    "levit_128s",
    "lowformer_b0",
    "test_mambaout",
    "maxvit_pico_rw_256",
    "poolformerv2_s12",
    "gmlp_ti16_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "test_nfnet",
    "pit_ti_224",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnet10t",
    "resnetv2_18",
    "rexnet_100",
    "legacy_seresnet18",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "twins_svt_small",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "vitamin_small_224",
    "volo_d1_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41p",
    "xcit_nano_12_p8_224",
    "selecsls42",
    "tresnet_m",
    "nextvit_small",
    "inception_v4",
    "inception_resnet_v2",
    "beit_base_patch16_224",
    "naflexvit_base_patch16_parfac_gap",
]
"""The smallest of modules of timm.models; those behind xcit have 30M parameters and more."""

TRANSFORMERS: dict[str, Tiny] = {**ENCODERS, **DECODERS, **ENCODER_DECODERS, **PICTURES}

EXAMPLES = 2
SIZES = {
    "inception_v3": 299,
    "vit_b_32": 224,
    "swin_t": 224,
    "swin_v2_t": 224,
    "maxvit_t": 224,
    "alexnet": 224,
}
"""Pixels that torchvision's models want; the others take 96."""


def torchvision_model(name: str) -> Specimen:
    models = importable_torchvision().models
    given = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return _of_pictures(
        "torchvision", name, models.get_model(name, weights=None, **given), 3, SIZES.get(name, 96)
    )


def timm_model(name: str) -> Specimen:
    importable_torchvision()
    import timm

    model = timm.create_model(name)
    channels, size, _ = model.default_cfg["input_size"]
    return _of_pictures("timm", name, model, channels, size)


def transformers_model(name: str) -> Specimen:
    importable_torchvision()
    import transformers

    transformers.logging.set_verbosity_error()
    tiny = TRANSFORMERS[name]
    kind = getattr(transformers, tiny.model)
    draw = torch.Generator().manual_seed(1)
    batches = [_inputs(tiny.inputs, draw) for _ in range(2)]
    return Specimen("transformers", name, warm(kind(kind.config_class(**tiny.config)), batches), batches)


LIBRARIES: dict[str, tuple[Callable[[str], Specimen], list[str]]] = {
    "torchvision": (torchvision_model, TORCHVISION),
    "timm": (timm_model, TIMM),
    "transformers": (transformers_model, list(TRANSFORMERS)),
}


def specimen(library: str, name: str) -> Specimen:
    """A model with random weights that are the same every time; other random numbers stay as they are."""
    with _fixed():
        return LIBRARIES[library][0](name)


@contextmanager
def _fixed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _of_pictures(library: str, name: str, model: nn.Module, channels: int, size: int) -> Specimen:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(EXAMPLES, channels, size, size, generator=draw) for _ in range(2)]
    return Specimen(library, name, warm(model, batches), batches)


def _inputs(kind: str, draw: torch.Generator) -> dict[str, Tensor]:
    def ids(length: int) -> Tensor:
        return torch.randint(3, 99, (EXAMPLES, length), generator=draw)

    def floats(*shape: int) -> Tensor:
        return torch.randn(EXAMPLES, *shape, generator=draw)

    mask = torch.ones(EXAMPLES, 12, dtype=torch.long)
    mask[1, 9:] = 0
    made: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ids": lambda: {"input_ids": ids(12)},
        "masked": lambda: {"input_ids": ids(12), "attention_mask": mask},
        "both": lambda: {"input_ids": ids(12), "decoder_input_ids": ids(7)},
        "pixels": lambda: {"pixel_values": floats(3, 32, 32)},
        "wide pixels": lambda: {"pixel_values": floats(3, 64, 64)},
        "waves": lambda: {"input_values": floats(400)},
        "spectrogram": lambda: {"input_values": floats(32, 16)},
        "speech": lambda: {"input_features": floats(16, 40), "decoder_input_ids": ids(7)},
    }
    return made[kind]()


@cache
def importable_torchvision() -> ModuleType:
    """torchvision beside a torch without CUDA, for which its wheel lacks two operators."""
    try:
        import torchvision
    except RuntimeError:
        _declare("nms", "qnms")
        import torchvision
    return torchvision


_DECLARED: list[Any] = []  # torch forgets them with the library object


def _declare(*operators: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in operators:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
