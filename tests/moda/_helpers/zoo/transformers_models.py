"""Classifiers of Hugging Face transformers, from small configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from tests.moda._helpers.zoo.entry import CLASSES, Entry, Inputs

_VOCABULARY = 60
_TEXT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_DECODER = {**_TEXT, "pad_token_id": 0, "max_position_embeddings": 32}
_GROUPED = {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}
_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_AUDIO = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8, 8),
    "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "mask_time_length": 2, "apply_spec_augment": False,
}  # fmt: skip


def _tokens(batch: int, generator: Generator) -> Inputs:
    ids = torch.randint(2, _VOCABULARY, (batch, 10), generator=generator)
    lengths = torch.randint(5, 11, (batch, 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    return (), {"input_ids": ids * mask, "attention_mask": mask}


def _whole_tokens(batch: int, generator: Generator) -> Inputs:
    """Ten tokens each, of which the last is the end of a sequence: models with an encoder and a decoder need that."""
    ids = torch.randint(3, _VOCABULARY, (batch, 10), generator=generator)
    ids[:, -1] = 2
    return (), {"input_ids": ids}


def _pixels(size: int) -> Callable[[int, Generator], Inputs]:
    def make(batch: int, generator: Generator) -> Inputs:
        return (), {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}

    return make


def _frames(batch: int, generator: Generator) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 4, 3, 32, 32, generator=generator)}


def _sound(batch: int, generator: Generator) -> Inputs:
    return (), {"input_values": torch.randn(batch, 1600, generator=generator)}


def _spectrum(batch: int, generator: Generator) -> Inputs:
    return (), {"input_features": torch.randn(batch, 16, 40, generator=generator)}


def _spectrogram(batch: int, generator: Generator) -> Inputs:
    return (), {"input_values": torch.randn(batch, 40, 16, generator=generator)}


# Name: prefix of the class names, what it classifies, settings of its configuration, inputs.
_MODELS: dict[str, tuple[str, str, Mapping[str, Any], Callable[[int, Generator], Inputs]]] = {
    "albert": ("Albert", "Sequence", {**_TEXT, "embedding_size": 8}, _tokens),
    "bart": ("Bart", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}, _whole_tokens),
    "bert": ("Bert", "Sequence", _TEXT, _tokens),
    "big_bird": ("BigBird", "Sequence", {**_TEXT, "attention_type": "original_full"}, _tokens),
    "bloom": ("Bloom", "Sequence", {"vocab_size": _VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}, _tokens),
    "camembert": ("Camembert", "Sequence", {**_TEXT, "pad_token_id": 0}, _tokens),
    "convbert": ("ConvBert", "Sequence", {**_TEXT, "embedding_size": 16}, _tokens),
    "ctrl": ("CTRL", "Sequence", {"vocab_size": _VOCABULARY, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "pad_token_id": 0}, _tokens),
    "deberta": ("Deberta", "Sequence", {**_TEXT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}, _tokens),
    "deberta_v2": ("DebertaV2", "Sequence", {**_TEXT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}, _tokens),
    "distilbert": ("DistilBert", "Sequence", {"vocab_size": _VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, _tokens),
    "electra": ("Electra", "Sequence", {**_TEXT, "embedding_size": 8}, _tokens),
    "ernie": ("Ernie", "Sequence", _TEXT, _tokens),
    "falcon": ("Falcon", "Sequence", {"vocab_size": _VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}, _tokens),
    "flaubert": ("Flaubert", "Sequence", {"vocab_size": _VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2}, _tokens),
    "fnet": ("FNet", "Sequence", {"vocab_size": _VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}, _whole_tokens),
    "funnel": ("Funnel", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "d_inner": 24, "n_head": 2, "d_head": 8, "block_sizes": [1, 1], "num_decoder_layers": 1}, _tokens),
    "gemma": ("Gemma", "Sequence", _GROUPED, _tokens),
    "gemma2": ("Gemma2", "Sequence", {**_GROUPED, "sliding_window": 4}, _tokens),
    "gpt2": ("GPT2", "Sequence", {"vocab_size": _VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}, _tokens),
    "gpt_bigcode": ("GPTBigCode", "Sequence", {"vocab_size": _VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}, _tokens),
    "gpt_neo": ("GPTNeo", "Sequence", {"vocab_size": _VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4, "pad_token_id": 0}, _tokens),
    "gpt_neox": ("GPTNeoX", "Sequence", _DECODER, _tokens),
    "gptj": ("GPTJ", "Sequence", {"vocab_size": _VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "pad_token_id": 0}, _tokens),
    "ibert": ("IBert", "Sequence", _TEXT, _tokens),
    "layoutlm": ("LayoutLM", "Sequence", _TEXT, _tokens),
    "llama": ("Llama", "Sequence", _GROUPED, _tokens),
    "longformer": ("Longformer", "Sequence", {**_TEXT, "attention_window": 4, "pad_token_id": 0}, _tokens),
    "mistral": ("Mistral", "Sequence", {**_GROUPED, "sliding_window": 4}, _tokens),
    "mixtral": ("Mixtral", "Sequence", {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, _tokens),
    "mobilebert": ("MobileBert", "Sequence", {**_TEXT, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8, "num_feedforward_networks": 1}, _tokens),
    "modernbert": ("ModernBert", "Sequence", {**_TEXT, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "global_attn_every_n_layers": 2, "local_attention": 4}, _tokens),
    "mpnet": ("MPNet", "Sequence", {**_TEXT, "pad_token_id": 0}, _tokens),
    "mpt": ("Mpt", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2, "pad_token_id": 0}, _tokens),
    "nystromformer": ("Nystromformer", "Sequence", {**_TEXT, "segment_means_seq_len": 10, "num_landmarks": 10}, _whole_tokens),
    "opt": ("OPT", "Sequence", {"vocab_size": _VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0}, _tokens),
    "persimmon": ("Persimmon", "Sequence", _DECODER, _tokens),
    "phi": ("Phi", "Sequence", _DECODER, _tokens),
    "qwen2": ("Qwen2", "Sequence", {**_DECODER, "num_key_value_heads": 1}, _tokens),
    "qwen3": ("Qwen3", "Sequence", _GROUPED, _tokens),
    "rembert": ("RemBert", "Sequence", {**_TEXT, "input_embedding_size": 8, "output_embedding_size": 8}, _tokens),
    "roberta": ("Roberta", "Sequence", {**_TEXT, "pad_token_id": 0}, _tokens),
    "roberta_prelayernorm": ("RobertaPreLayerNorm", "Sequence", {**_TEXT, "pad_token_id": 0}, _tokens),
    "roformer": ("RoFormer", "Sequence", {**_TEXT, "embedding_size": 8}, _tokens),
    "squeezebert": ("SqueezeBert", "Sequence", {**_TEXT, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2, "embedding_size": 16}, _tokens),
    "stablelm": ("StableLm", "Sequence", {**_DECODER, "num_key_value_heads": 1}, _tokens),
    "t5": ("T5", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 2, "decoder_start_token_id": 0, "pad_token_id": 0}, _whole_tokens),
    "t5_gated": ("T5", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "feed_forward_proj": "gated-gelu"}, _whole_tokens),
    "umt5": ("UMT5", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 2, "decoder_start_token_id": 0, "pad_token_id": 0}, _whole_tokens),
    "xlm": ("XLM", "Sequence", {"vocab_size": _VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0}, _tokens),
    "xlm_roberta": ("XLMRoberta", "Sequence", {**_TEXT, "pad_token_id": 0}, _tokens),
    "xlnet": ("XLNet", "Sequence", {"vocab_size": _VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, _tokens),
    "bert_tokens": ("Bert", "Token", _TEXT, _tokens),
    "beit": ("Beit", "Image", _VIT, _pixels(32)),
    "bit": ("Bit", "Image", {**_STAGES, "embedding_size": 8, "num_groups": 4}, _pixels(32)),
    "convnext": ("ConvNext", "Image", _STAGES, _pixels(32)),
    "convnextv2": ("ConvNextV2", "Image", _STAGES, _pixels(32)),
    "data2vec_vision": ("Data2VecVision", "Image", _VIT, _pixels(32)),
    "deit": ("DeiT", "Image", _VIT, _pixels(32)),
    "dinov2": ("Dinov2", "Image", {k: v for k, v in _VIT.items() if k != "intermediate_size"}, _pixels(32)),
    "efficientnet": ("EfficientNet", "Image", {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2], "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 4, 4], "depthwise_padding": []}, _pixels(32)),
    "focalnet": ("FocalNet", "Image", {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [16, 32]}, _pixels(32)),
    "hiera": ("Hiera", "Image", {"image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "masked_unit_size": [4, 4], "masked_unit_attention": [True, False], "num_query_pool": 1, "query_stride": [2, 2]}, _pixels(32)),
    "levit": ("Levit", "Image", {"image_size": 64, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]}, _pixels(64)),
    "mobilenet_v1": ("MobileNetV1", "Image", {"depth_multiplier": 0.25}, _pixels(32)),
    "mobilenet_v2": ("MobileNetV2", "Image", {"depth_multiplier": 0.25}, _pixels(32)),
    "mobilevit": ("MobileViT", "Image", {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 32], "num_attention_heads": 2}, _pixels(64)),
    "mobilevitv2": ("MobileViTV2", "Image", {"image_size": 64, "width_multiplier": 0.25}, _pixels(64)),
    "poolformer": ("PoolFormer", "Image", _STAGES, _pixels(32)),
    "pvt": ("Pvt", "Image", {**_STAGES, "image_size": 32, "num_attention_heads": [1, 2, 2, 2], "sequence_reduction_ratios": [4, 2, 1, 1]}, _pixels(32)),
    "pvt_v2": ("PvtV2", "Image", {**_STAGES, "image_size": 32, "num_attention_heads": [1, 2, 2, 2]}, _pixels(32)),
    "regnet": ("RegNet", "Image", {**_STAGES, "embedding_size": 8, "groups_width": 8}, _pixels(32)),
    "resnet": ("ResNet", "Image", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}, _pixels(32)),
    "resnet_bottleneck": ("ResNet", "Image", {**_STAGES, "embedding_size": 8}, _pixels(32)),
    "segformer": ("Segformer", "Image", {**_STAGES, "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 16}, _pixels(32)),
    "swiftformer": ("SwiftFormer", "Image", {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}, _pixels(64)),
    "swin": ("Swin", "Image", {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}, _pixels(32)),
    "swinv2": ("Swinv2", "Image", {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}, _pixels(32)),
    "vit": ("ViT", "Image", _VIT, _pixels(32)),
    "vit_msn": ("ViTMSN", "Image", _VIT, _pixels(32)),
    "timesformer": ("Timesformer", "Video", {**_VIT, "num_frames": 4}, _frames),
    "videomae": ("VideoMAE", "Video", {**_VIT, "num_frames": 4}, _frames),
    "vivit": ("Vivit", "Video", {**_VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]}, _frames),
    "audio_spectrogram": ("AST", "Audio", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_length": 40, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8, "frequency_stride": 8}, _spectrogram),
    "hubert": ("Hubert", "Sequence", _AUDIO, _sound),
    "sew": ("SEW", "Sequence", {**_AUDIO, "squeeze_factor": 2}, _sound),
    "unispeech": ("UniSpeech", "Sequence", _AUDIO, _sound),
    "wav2vec2": ("Wav2Vec2", "Sequence", _AUDIO, _sound),
    "wavlm": ("WavLM", "Sequence", _AUDIO, _sound),
    "whisper": ("Whisper", "Audio", {"vocab_size": _VOCABULARY, "num_mel_bins": 16, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_layers": 1, "max_source_positions": 20, "classifier_proj_size": 16}, _spectrum),
}  # fmt: skip


def _build(prefix: str, kind: str, settings: Mapping[str, Any]) -> nn.Module:
    import transformers

    configuration = getattr(transformers, f"{prefix}Config")(num_labels=CLASSES, **settings)
    return getattr(transformers, f"{prefix}For{kind}Classification")(configuration)


def entries() -> list[Entry]:
    """Every classifier of transformers in the zoo."""
    return [
        Entry(name, "transformers", partial(_build, prefix, kind, settings), inputs, output="logits")
        for name, (prefix, kind, settings, inputs) in _MODELS.items()
    ]
