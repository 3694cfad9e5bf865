"""Tiny Hugging Face text models, one for each architecture, with random weights."""

from dataclasses import dataclass, field
from typing import Any

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GQA = {**SMALL, "num_key_value_heads": 2}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
N_NAMES = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MAMBA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}


@dataclass(frozen=True)
class Tiny:
    """A Hugging Face architecture at a size for tests.

    Attributes:
        model: class in transformers; its config class is found from it.
        config: what is given to that one; the rest is as it stands there.
        inputs: what it is called with: ids, ids and mask, encoder-decoder, pixels, waves, spectrogram.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: str = "ids"


ENCODERS = {
    "bert": Tiny("BertForSequenceClassification", SMALL, "masked"),
    "roberta": Tiny("RobertaForSequenceClassification", SMALL, "masked"),
    "electra": Tiny("ElectraForSequenceClassification", {**SMALL, "embedding_size": 16}, "masked"),
    "albert": Tiny("AlbertForSequenceClassification", {**SMALL, "embedding_size": 16}, "masked"),
    "distilbert": Tiny(
        "DistilBertForSequenceClassification",
        {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
        "masked",
    ),
    "mpnet": Tiny("MPNetForSequenceClassification", SMALL, "masked"),
    "deberta": Tiny("DebertaForSequenceClassification", SMALL, "masked"),
    "deberta_v2": Tiny("DebertaV2ForSequenceClassification", SMALL, "masked"),
    "camembert": Tiny("CamembertForMaskedLM", SMALL, "masked"),
    "xlm_roberta": Tiny("XLMRobertaForTokenClassification", SMALL, "masked"),
    "modernbert": Tiny("ModernBertForSequenceClassification", {**SMALL, "pad_token_id": 0}, "masked"),
    "roformer": Tiny("RoFormerForSequenceClassification", SMALL, "masked"),
    "convbert": Tiny("ConvBertForSequenceClassification", {**SMALL, "embedding_size": 32}, "masked"),
    "fnet": Tiny("FNetForSequenceClassification", SMALL),
    "funnel": Tiny(
        "FunnelForSequenceClassification",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "block_sizes": [1, 1, 1],
            "num_decoder_layers": 1,
        },
        "masked",
    ),
    "squeezebert": Tiny("SqueezeBertForSequenceClassification", {**SMALL, "embedding_size": 32}, "masked"),
    "mobilebert": Tiny(
        "MobileBertForSequenceClassification",
        {**SMALL, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        "masked",
    ),
    "nystromformer": Tiny(
        "NystromformerForSequenceClassification", {**SMALL, "num_landmarks": 4, "segment_means_seq_len": 12}
    ),
    "megatron_bert": Tiny("MegatronBertForSequenceClassification", SMALL, "masked"),
    "esm": Tiny("EsmForSequenceClassification", {**SMALL, "pad_token_id": 1}, "masked"),
    "layoutlm": Tiny("LayoutLMForSequenceClassification", SMALL, "masked"),
    "xlnet": Tiny(
        "XLNetForSequenceClassification",
        {"vocab_size": 99, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
    ),
}
DECODERS = {
    "gpt2": Tiny("GPT2LMHeadModel", N_NAMES),
    "gpt_neo": Tiny(
        "GPTNeoForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gptj": Tiny("GPTJForCausalLM", {**N_NAMES, "rotary_dim": 4}),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", SMALL),
    "gpt_bigcode": Tiny("GPTBigCodeForCausalLM", N_NAMES),
    "codegen": Tiny("CodeGenForCausalLM", {**N_NAMES, "rotary_dim": 4}),
    "opt": Tiny("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Tiny("BloomForCausalLM", {"vocab_size": 99, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": Tiny("FalconForCausalLM", SMALL),
    "mpt": Tiny(
        "MptForCausalLM", {"vocab_size": 99, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
    ),
    "llama": Tiny("LlamaForCausalLM", GQA),
    "mistral": Tiny("MistralForCausalLM", GQA),
    "qwen2": Tiny("Qwen2ForCausalLM", GQA),
    "qwen3": Tiny("Qwen3ForCausalLM", {**GQA, "head_dim": 8}),
    "gemma": Tiny("GemmaForCausalLM", {**GQA, "head_dim": 8}),
    "gemma2": Tiny("Gemma2ForCausalLM", {**GQA, "head_dim": 8}),
    "phi": Tiny("PhiForCausalLM", SMALL),
    "phi3": Tiny("Phi3ForCausalLM", {**GQA, "pad_token_id": 0}),
    "stablelm": Tiny("StableLmForCausalLM", GQA),
    "starcoder2": Tiny("Starcoder2ForCausalLM", GQA),
    "olmo": Tiny("OlmoForCausalLM", GQA),
    "cohere": Tiny("CohereForCausalLM", {**GQA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "granite": Tiny("GraniteForCausalLM", GQA),
    "biogpt": Tiny("BioGptForCausalLM", SMALL),
    "xglm": Tiny(
        "XGLMForCausalLM",
        {"vocab_size": 99, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    ),
    "mixtral": Tiny("MixtralForCausalLM", {**GQA, "num_local_experts": 4}),
    "qwen2_moe": Tiny(
        "Qwen2MoeForCausalLM",
        {**GQA, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "olmoe": Tiny("OlmoeForCausalLM", {**GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "mamba": Tiny("MambaForCausalLM", MAMBA),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        {**MAMBA, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4},
    ),
    "falcon_mamba": Tiny("FalconMambaForCausalLM", MAMBA),
    "rwkv": Tiny("RwkvForCausalLM", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3}),
    "recurrent_gemma": Tiny("RecurrentGemmaForCausalLM", {**GQA, "lru_width": 32, "head_dim": 8}),
}
ENCODER_DECODERS = {
    "t5": Tiny("T5ForConditionalGeneration", T5, "both"),
    "mt5": Tiny("MT5ForConditionalGeneration", T5, "both"),
    "bart": Tiny("BartForConditionalGeneration", BART, "both"),
    "mbart": Tiny("MBartForConditionalGeneration", BART, "both"),
    "pegasus": Tiny("PegasusForConditionalGeneration", BART, "both"),
    "marian": Tiny("MarianMTModel", {**BART, "pad_token_id": 0, "decoder_start_token_id": 0}, "both"),
    "blenderbot_small": Tiny("BlenderbotSmallForConditionalGeneration", BART, "both"),
    "switch_transformers": Tiny(
        "SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 4}, "both"
    ),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        {
            **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        "speech",
    ),
}
