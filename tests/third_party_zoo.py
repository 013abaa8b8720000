"""Published architectures at toy size, random-initialized: name -> (model, inputs).

Nothing is downloaded: every model is built from a configuration. Sizes are such that a forward
takes a few milliseconds, that BatchNorm sees several values per channel, and that heads, groups
and layers still are several.
"""

import importlib
import importlib.util
import sys
import types
from contextlib import contextmanager

import torch

VOCABULARY = 23


def tokens(**more):
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 7)), **more}


def images(size=32, batch=4):
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def build_hf(name, inputs=tokens, config=None, **options):
    """Return (model, inputs) for a class of transformers and its configuration."""
    hf = importlib.import_module("transformers")
    config = getattr(hf, config or name.split("For")[0].removesuffix("Model") + "Config")
    return getattr(hf, name)(config(**options)).train(), inputs()


_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# The names that most decoders share.
_DECODER = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"max_position_embeddings": 32, "use_cache": False, "tie_word_embeddings": False},
    **_SPECIAL,
}
_HEADS_OF_8 = {"head_dim": 8}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
_ENCODER = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32},
    **_SPECIAL,
}
_GPT2 = {
    **{"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    **{"use_cache": False, "bos_token_id": 1, "eos_token_id": 2},
}
_VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "num_labels": 5},
}
_SWIN = {
    **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]},
    **{"window_size": 4, "num_labels": 5},
}
_CONVNEXT = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "num_labels": 5}
_RESNET = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [2, 1], "num_labels": 5}


def small_images():
    return images(16)


def large_images():
    return images(64)


def _speech():
    return {"input_values": torch.randn(3, 400)}


def _whisper():
    ids = torch.randint(3, VOCABULARY, (3, 5))
    return {"input_features": torch.randn(3, 8, 24), "decoder_input_ids": ids}


def _with_decoder_tokens():
    return tokens(decoder_input_ids=torch.randint(3, VOCABULARY, (3, 5)))


def _with_labels():
    ids = torch.randint(3, VOCABULARY, (3, 7))
    return {"input_ids": ids, "labels": ids}


def _hf(name, inputs=tokens, **options):
    return lambda: build_hf(name, inputs, **options)


VISION_MODELS = {
    "resnet": _hf("ResNetForImageClassification", images, layer_type="bottleneck", **_RESNET),
    "resnet_basic": _hf("ResNetForImageClassification", images, layer_type="basic", **_RESNET),
    "regnet": _hf(
        "RegNetForImageClassification",
        images,
        **{**_RESNET, "hidden_sizes": [8, 16], "groups_width": 4},
    ),
    "bit": _hf(
        "BitForImageClassification",
        images,
        **{**_RESNET, "embedding_size": 8, "hidden_sizes": [16, 32], "num_groups": 4},
    ),
    "convnext": _hf("ConvNextForImageClassification", images, **_CONVNEXT),
    "convnextv2": _hf("ConvNextV2ForImageClassification", images, **_CONVNEXT),
    "mobilenet_v1": _hf(
        "MobileNetV1ForImageClassification",
        images,
        **{"depth_multiplier": 0.02, "min_depth": 4, "num_labels": 5},
        classifier_dropout_prob=0.1,  # 0.999, the default, leaves no signal
    ),
    "mobilenet_v2": _hf(
        "MobileNetV2ForImageClassification",
        images,
        **{"depth_multiplier": 0.02, "min_depth": 4, "depth_divisible_by": 4, "expand_ratio": 2},
        **{"output_stride": 8, "classifier_dropout_prob": 0.1, "num_labels": 5},
        finegrained_output=False,
    ),
    "efficientnet": _hf(
        "EfficientNetForImageClassification",
        images,
        **{"width_coefficient": 0.1, "num_labels": 5, "hidden_dim": 128, "kernel_sizes": [3, 3]},
        **{"in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2]},
        **{"num_block_repeats": [1, 2], "expand_ratios": [1, 4], "depthwise_padding": []},
        depth_coefficient=1.0,
    ),
    "vit": _hf("ViTForImageClassification", small_images, **_VISION),
    "deit": _hf("DeiTForImageClassification", small_images, **_VISION),
    "beit": _hf("BeitForImageClassification", small_images, **_VISION),
    "dinov2": _hf("Dinov2ForImageClassification", small_images, **_VISION),
    "swin": _hf("SwinForImageClassification", small_images, **_SWIN),
    "swinv2": _hf("Swinv2ForImageClassification", small_images, **_SWIN),
    "levit": _hf(
        "LevitForImageClassification",
        large_images,
        **{"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4]},
        **{"depths": [1, 1, 1], "key_dim": [8, 8, 8], "num_labels": 5, "attention_ratio": [2] * 3},
        down_ops=[["Subsample", 8, 2, 4, 2, 2]] * 2 + [[""]],
    ),
    "cvt": _hf(
        "CvtForImageClassification",
        images,
        **{"embed_dim": [8, 12], "num_heads": [1, 2], "depth": [1, 2], "num_labels": 5},
        **{"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1]},
        **{"mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0] * 2, "drop_rate": [0.0] * 2},
        **{"drop_path_rate": [0.0, 0.1], "qkv_bias": [True] * 2, "cls_token": [False, True]},
        **{"qkv_projection_method": ["dw_bn"] * 2, "kernel_qkv": [3] * 2, "padding_kv": [1] * 2},
        **{"stride_kv": [2] * 2, "padding_q": [1] * 2, "stride_q": [1] * 2},
    ),
    "poolformer": _hf(
        "PoolFormerForImageClassification",
        images,
        config="PoolFormerConfig",
        **{"hidden_sizes": [8, 12], "depths": [1, 1], "num_encoder_blocks": 2, "num_labels": 5},
        **{"patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
    ),
}

TEXT_MODELS = {
    "bert": _hf("BertModel", **_ENCODER),
    "bert_mlm_tied": _hf("BertForMaskedLM", **_ENCODER),
    "roberta": _hf("RobertaForMaskedLM", **_ENCODER),
    "electra": _hf("ElectraForMaskedLM", **_ENCODER, embedding_size=12),
    "distilbert": _hf(
        "DistilBertForMaskedLM",
        **{"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        max_position_embeddings=32,
    ),
    "modernbert": _hf("ModernBertModel", **_ENCODER, cls_token_id=1, sep_token_id=2),
    "gpt2_tied": _hf("GPT2LMHeadModel", config="GPT2Config", **_GPT2),
    "gpt2_untied": _hf("GPT2LMHeadModel", config="GPT2Config", **_GPT2, tie_word_embeddings=False),
    "gpt_neox": _hf("GPTNeoXForCausalLM", **_DECODER),
    "llama": _hf("LlamaForCausalLM", **_DECODER),
    "llama_tied": _hf("LlamaForCausalLM", **{**_DECODER, "tie_word_embeddings": True}),
    "llama_loss": _hf("LlamaForCausalLM", _with_labels, **_DECODER),
    "qwen2": _hf("Qwen2ForCausalLM", **_DECODER),
    "qwen3": _hf("Qwen3ForCausalLM", **_DECODER, **_HEADS_OF_8),
    "qwen3_moe": _hf(
        "Qwen3MoeForCausalLM",
        **{**_DECODER, **_HEADS_OF_8, **_MOE, "num_experts": 3, "moe_intermediate_size": 12},
        experts_implementation="eager",  # the fused kernels have no float64
    ),
    "mixtral": _hf(
        "MixtralForCausalLM",
        **_DECODER,
        **_MOE,
        num_local_experts=3,
        experts_implementation="eager",
    ),
    "gemma2": _hf("Gemma2ForCausalLM", **_DECODER, **_HEADS_OF_8, query_pre_attn_scalar=8),
    "gemma3": _hf(
        "Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        **{**_DECODER, **_HEADS_OF_8, "query_pre_attn_scalar": 8},
    ),
    "olmo": _hf("OlmoForCausalLM", **_DECODER),
    "olmo2": _hf("Olmo2ForCausalLM", **_DECODER),
    "cohere_qk_norm": _hf("CohereForCausalLM", **_DECODER, use_qk_norm=True),
    "phi": _hf("PhiForCausalLM", **_DECODER),
    "granite": _hf("GraniteForCausalLM", **_DECODER),
    "t5": _hf(
        "T5ForConditionalGeneration",
        _with_decoder_tokens,
        **{"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1},
        **{"num_heads": 2, "decoder_start_token_id": 0, "use_cache": False, **_SPECIAL},
    ),
    "bart": _hf(
        "BartForConditionalGeneration",
        _with_decoder_tokens,
        **{"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "max_position_embeddings": 32, "use_cache": False, **_SPECIAL},
        **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
    "mamba": _hf(
        "MambaForCausalLM",
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        **{"use_cache": False, "tie_word_embeddings": False, **_SPECIAL},
    ),
    "mamba2": _hf(
        "Mamba2ForCausalLM",
        **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        **{"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "use_cache": False},
        **{"tie_word_embeddings": False, **_SPECIAL},
    ),
}

SPEECH_MODELS = {
    "wav2vec2": _hf(
        "Wav2Vec2Model",
        _speech,
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "conv_dim": (8, 8), "conv_stride": (5, 4)},
        **{"conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4},
        **{"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0},
    ),
    "whisper": _hf(
        "WhisperForConditionalGeneration",
        _whisper,
        **{"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 12},
        **{"max_target_positions": 16, "decoder_start_token_id": 1, "use_cache": False, **_SPECIAL},
    ),
}

HF_MODELS = {**VISION_MODELS, **TEXT_MODELS, **SPEECH_MODELS}


class _AnyClass(type):
    """A class that, taken for an enum, has every member."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _AnyModule(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {})


@contextmanager
def _torchvision_for_imports():
    """Let timm be imported where torchvision is not: its models use nothing of it here."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
        names = ["torchvision" + part for part in parts]
        sys.modules.update({name: _AnyModule(name) for name in names})
        for name in names[1:]:
            parent, _, own = name.rpartition(".")
            setattr(sys.modules[parent], own, sys.modules[name])
        try:
            yield
        finally:
            for name in names:
                del sys.modules[name]
        return
    yield


def _timm(module, make, size=32):
    """Return a builder of (model, inputs), given a model's function of its module of timm."""

    def build():
        with _torchvision_for_imports():
            found = importlib.import_module(f"timm.models.{module}")
        return make(found).train(), torch.randn(4, 3, size, size)

    return build


def _repvgg(m):
    stages = tuple(m.ByoBlockCfg(type="rep", d=d, c=c, s=2, gs=0) for d, c in ((1, 6), (2, 8)))
    return m.ByobNet(m.ByoModelCfg(blocks=stages, stem_type="rep", stem_chs=6), num_classes=5)


def _ghostnet(m):
    stages = [[[3, 16, 16, 0, 1]], [[3, 16, 24, 0, 2]], [[5, 24, 40, 0.25, 2]]]
    return m.GhostNet(stages, num_classes=5, width=0.25)


def _nfnet(m):
    config = m.NfCfg(depths=(1, 1, 1, 1), channels=(8, 8, 16, 16), group_size=4, num_features=16)
    return m.NormFreeNet(config, num_classes=5)


_SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_classes": 5}
_FOUR = {"depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2), "num_classes": 5}

TIMM_MODELS = {
    "timm_densenet": _timm(
        "densenet",
        lambda m: m.DenseNet(growth_rate=4, block_config=(2, 2), bn_size=2, num_classes=5),
    ),
    "timm_vit_qk_norm": _timm(
        "vision_transformer",
        lambda m: m.VisionTransformer(**_SMALL, qk_norm=True, depth=1, num_heads=2),
        16,
    ),
    "timm_xcit": _timm(
        "xcit",
        lambda m: m.Xcit(img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=5),
    ),
    "timm_edgenext": _timm(
        "edgenext", lambda m: m.EdgeNeXt(dims=(8, 12, 16, 16), **_FOUR, act_layer=m.nn.GELU), 64
    ),
    "timm_ghostnet": _timm("ghostnet", _ghostnet, 64),
    "timm_nfnet": _timm("nfnet", _nfnet, 64),
    "timm_repvgg": _timm("byobnet", _repvgg),
    "timm_mixer": _timm("mlp_mixer", lambda m: m.MlpMixer(**_SMALL, num_blocks=1), 16),
}

MODELS = {**HF_MODELS, **(TIMM_MODELS if importlib.util.find_spec("timm") else {})}
