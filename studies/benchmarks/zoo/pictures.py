"""Tiny Hugging Face models for pictures and sound, one for each architecture, with random weights."""

from benchmarks.zoo.text import SMALL, Tiny

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
WAVE = {
    **{key: value for key, value in SMALL.items() if key != "max_position_embeddings"},
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_labels": 7,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 7,
}
PICTURES = {
    "vit": Tiny("ViTForImageClassification", VIT, "pixels"),
    "deit": Tiny("DeiTForImageClassification", VIT, "pixels"),
    "beit": Tiny("BeitForImageClassification", {**VIT, "vocab_size": 99}, "pixels"),
    "dinov2": Tiny("Dinov2ForImageClassification", VIT, "pixels"),
    "vit_msn": Tiny("ViTMSNForImageClassification", VIT, "pixels"),
    "swin": Tiny("SwinForImageClassification", SWIN, "pixels"),
    "swinv2": Tiny("Swinv2ForImageClassification", SWIN, "pixels"),
    "convnext": Tiny(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "num_labels": 7},
        "pixels",
    ),
    "convnextv2": Tiny(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "num_labels": 7},
        "pixels",
    ),
    "resnet": Tiny(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "num_labels": 7},
        "pixels",
    ),
    "regnet": Tiny(
        "RegNetForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 2, 1],
            "groups_width": 4,
            "num_labels": 7,
        },
        "pixels",
    ),
    "mobilenet_v2": Tiny("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, "pixels"),
    "segformer": Tiny(
        "SegformerForImageClassification",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "num_labels": 7,
        },
        "pixels",
    ),
    "poolformer": Tiny(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 7},
        "pixels",
    ),
    "pvt": Tiny(
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "num_labels": 7,
        },
        "wide pixels",
    ),
    "focalnet": Tiny(
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
            "num_labels": 7,
        },
        "pixels",
    ),
    "clip_vision": Tiny("CLIPVisionModel", {k: v for k, v in VIT.items() if k != "num_labels"}, "pixels"),
    "clip_text": Tiny("CLIPTextModel", SMALL),
    "wav2vec2": Tiny("Wav2Vec2ForSequenceClassification", WAVE, "waves"),
    "hubert": Tiny("HubertForSequenceClassification", WAVE, "waves"),
    "wavlm": Tiny("WavLMForSequenceClassification", WAVE, "waves"),
    "sew": Tiny("SEWForSequenceClassification", {**WAVE, "squeeze_factor": 2}, "waves"),
    "ast": Tiny(
        "ASTForAudioClassification",
        {
            **{k: v for k, v in VIT.items() if k not in ("image_size",)},
            "max_length": 32,
            "num_mel_bins": 16,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        "spectrogram",
    ),
}
