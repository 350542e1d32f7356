"""Architectures of text models, and which methods work on each: the table of docs/COMPATIBILITY.md.

tests/unit/test_text_models.py trains every one that works, small and with random weights, and compares the modules that are
adapted with those that are written here by hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from routevl.errors import RoutevlError
from routevl.files import write_json
from routevl.settings import RunSettings
from routevl.training.check import check, write_data

VOCABULARY = ["[UNK]", "[PAD]", "<s>", "</s>", "[MASK]", *"abcdefghijklmnopqrstuvwxyz?"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
METHODS = {"lora": {"r": "2", "routing": "mul"}, "adapter": {"r": "2", "routing": "mul"}, "ia3": {}}
SETTINGS = {
    "prefix": "yes", "visual_tokens": "pooled", "freeze_layer_norm": "no", "epochs": "1", "batch_size": "2",
    "prediction_batch_size": "2", "learning_rate": "0.01", "warmup": "0", "weight_decay": "0", "max_text_tokens": "16",
    "beams": "2", "max_new_tokens": "3", "precision": "float32", "gradient_checkpointing": "no", "seed": "0",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers.

    Attributes:
        config: the class of its configurations.
        sizes: arguments of that class that make it small.
        task: what it is trained for.
        query_value, outputs: the ends of the names of the modules that LoRA and the Adapter adapt; none: refused.
        fused: groups and widths of the query, key and value that one module holds, and their order.
        tokenizer: its special tokens that are not the usual ones.
    """

    config: str
    task: str
    sizes: Mapping[str, Any]
    query_value: Sequence[str] = ()
    outputs: Sequence[str] = ()
    fused: tuple[int, tuple[int, int, int], str] | None = None
    tokenizer: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As transformers calls it."""
        return self.config.removesuffix("Config")

    def write_folder(self, folder: Path) -> transformers.PretrainedConfig:
        """What a folder has beside the weights: config.json and a tokenizer of single letters."""
        config = getattr(transformers, self.config)(**{**IDS, **self.sizes})
        config.save_pretrained(folder)
        tokenizer_of_letters(**self.tokenizer).save_pretrained(folder)
        return config


def tokenizer_of_letters(**special: str | None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters, with the usual special tokens unless others are given."""
    letters = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **{**tokens, **special})


def encoder(model: str, sizes: Mapping[str, Any], *modules: Any) -> Architecture:
    """An encoder, which answers questions."""
    return Architecture(f"{model}Config", "vqa", sizes, *modules)


def decoder(model: str, sizes: Mapping[str, Any], *modules: Any, **tokenizer: str | None) -> Architecture:
    """A causal language model, which writes captions."""
    return Architecture(f"{model}Config", "caption", sizes, *modules, tokenizer=tokenizer)


OF_BERT, AFTER_BERT = ("attention.self.query", "attention.self.value"), ("attention.output.dense", "output.dense")
OF_LLAMA, AFTER_LLAMA = ("self_attn.q_proj", "self_attn.v_proj"), ("self_attn.o_proj", "mlp.down_proj")
AFTER_BART, AFTER_NEOX = ("self_attn.out_proj", "fc2"), ("attention.dense", "mlp.dense_4h_to_h")
AFTER_BLOOM = ("self_attention.dense", "mlp.dense_4h_to_h")
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OF_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
ONE_OF_EACH = [[["global", "local"], 1]]
SIDE_BY_SIDE = (1, (32, 32, 32), "qkv")

ENCODERS = (
    encoder("Bert", SIZES, OF_BERT, AFTER_BERT),
    encoder("Roberta", SIZES, OF_BERT, AFTER_BERT),
    encoder("XLMRoberta", SIZES, OF_BERT, AFTER_BERT),
    encoder("Camembert", SIZES, OF_BERT, AFTER_BERT),
    encoder("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
            ("attention.q_lin", "attention.v_lin"), ("attention.out_lin", "ffn.lin2")),
    encoder("Albert", {**SIZES, "embedding_size": 16}, ("attention.query", "attention.value"), ("attention.dense", "ffn_output")),
    encoder("MPNet", SIZES, ("attention.attn.q", "attention.attn.v"), ("attention.attn.o", "output.dense")),
    encoder("Electra", {**SIZES, "embedding_size": 16}, OF_BERT, AFTER_BERT),
    encoder("ModernBert", SIZES, ("attn.Wqkv",), ("attn.Wo", "mlp.Wo"), SIDE_BY_SIDE),
    encoder("DebertaV2", {**SIZES, **DEBERTA}, (), AFTER_BERT),
    encoder("MobileBert", {**SIZES, "embedding_size": 16, "intra_bottleneck_size": 16}, OF_BERT,
            ("attention.output.dense", "encoder.layer.0.output.dense", "encoder.layer.1.output.dense")),
    encoder("RemBert", {**SIZES, "input_embedding_size": 16}, OF_BERT, AFTER_BERT),
    encoder("RoFormer", {**SIZES, "embedding_size": 32}, OF_BERT, AFTER_BERT),
    encoder("Nystromformer", SIZES, OF_BERT, AFTER_BERT),
    encoder("Ernie", SIZES, OF_BERT, AFTER_BERT),
    encoder("MegatronBert", SIZES, OF_BERT, AFTER_BERT),
    encoder("BigBird", SIZES, OF_BERT, AFTER_BERT),
    encoder("Esm", {**SIZES, "mask_token_id": 4}, OF_BERT, AFTER_BERT),
    encoder("ConvBert", {**SIZES, "embedding_size": 32}),
    encoder("SqueezeBert", {**SIZES, "embedding_size": 32}),
    encoder("FNet", {name: size for name, size in SIZES.items() if name != "num_attention_heads"}),
)  # fmt: skip
DECODERS = (
    decoder("GPT2", OF_GPT2, ("attn.c_attn",), ("attn.c_proj", "mlp.c_proj"), SIDE_BY_SIDE),
    decoder("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": ONE_OF_EACH},
            ("attn.attention.q_proj", "attn.attention.v_proj"), ("attn.attention.out_proj", "mlp.c_proj")),
    decoder("GPTNeoX", SIZES, ("attention.query_key_value",), AFTER_NEOX, (4, (8, 8, 8), "qkv")),
    decoder("GPTJ", {**OF_GPT2, "rotary_dim": 4}, ("attn.q_proj", "attn.v_proj"), ("attn.out_proj", "mlp.fc_out")),
    decoder("CodeGen", {**OF_GPT2, "rotary_dim": 4}, ("attn.qkv_proj",), ("attn.out_proj", "mlp.fc_out"), (4, (8, 8, 8), "qvk")),
    decoder("OPT", {**HEADS, "ffn_dim": 64, "word_embed_proj_dim": 16}, OF_LLAMA, AFTER_BART),
    decoder("Llama", GROUPED, OF_LLAMA, AFTER_LLAMA),
    decoder("Qwen2", GROUPED, OF_LLAMA, AFTER_LLAMA, bos_token=None),
    decoder("Qwen3", {**GROUPED, "head_dim": 8}, OF_LLAMA, AFTER_LLAMA),
    decoder("Mistral", GROUPED, OF_LLAMA, AFTER_LLAMA),
    decoder("Gemma2", {**GROUPED, "head_dim": 8}, OF_LLAMA, AFTER_LLAMA),
    decoder("Gemma3Text", {**GROUPED, "head_dim": 8}, OF_LLAMA, AFTER_LLAMA),
    decoder("Phi", GROUPED, OF_LLAMA, ("self_attn.dense", "mlp.fc2")),
    decoder("Phi3", GROUPED, ("self_attn.qkv_proj",), AFTER_LLAMA, (1, (32, 16, 16), "qkv")),
    decoder("Bloom", OF_BLOOM, ("self_attention.query_key_value",), AFTER_BLOOM, (4, (8, 8, 8), "qkv")),
    decoder("Falcon", {**HEADS, "num_kv_heads": 2, "new_decoder_architecture": True},
            ("self_attention.query_key_value",), AFTER_BLOOM, (2, (16, 8, 8), "qkv")),
    decoder("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
            ("attn.Wqkv",), ("attn.out_proj", "ffn.down_proj"), SIDE_BY_SIDE),
    decoder("GPTBigCode", OF_GPT2, ("attn.c_attn",), ("attn.c_proj", "mlp.c_proj"), (1, (32, 8, 8), "qkv")),
    decoder("XGLM", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, OF_LLAMA, AFTER_BART),
    decoder("BioGpt", SIZES, OF_LLAMA, AFTER_BART),
    decoder("StableLm", GROUPED, OF_LLAMA, AFTER_LLAMA),
    decoder("Olmo2", GROUPED, OF_LLAMA, AFTER_LLAMA),
    decoder("Cohere", GROUPED, OF_LLAMA, AFTER_LLAMA),
    decoder("Mixtral", {**GROUPED, "num_local_experts": 2}, OF_LLAMA),
    decoder("GptOss", {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    decoder("OpenAIGPT", OF_GPT2),
    decoder("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    decoder("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}),
)  # fmt: skip
ARCHITECTURES = ENCODERS + DECODERS


def write_vision_folder(folder: Path) -> None:
    """A vision model for the check, whose width is not the text models'."""
    model = "vit_tiny_patch16_224"
    write_json(folder / "config.json", {"architecture": model, "pretrained_cfg": timm.get_pretrained_cfg(model).to_dict()})


def settings_for(architecture: Architecture, method: str) -> RunSettings:
    """A run of a method on an architecture."""
    values = {**SETTINGS, "task": architecture.task, "method": method}
    return RunSettings.read(values, METHODS[method], "the table of text models")


def rows() -> Iterator[list[str]]:
    """The architecture, its task, and of each method whether it works."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        write_vision_folder(folder / "vision")
        for architecture in ARCHITECTURES:
            architecture.write_folder(folder / architecture.name)
            yield [architecture.name, architecture.task, *(outcome(architecture, method, folder) for method in METHODS)]


def outcome(architecture: Architecture, method: str, folder: Path) -> str:
    """Whether a method works on an architecture, as `routevl check-models` says."""
    try:
        check(settings_for(architecture, method), folder / architecture.name, folder / "vision", folder / "data")
    except RoutevlError as error:
        return "refused: " + str(error.__cause__ or error).partition("; ")[0]
    return "works"
