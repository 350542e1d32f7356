"""A model of two streams, as METER's (Dou et al., 2022): a text encoder's states and an image's tokens attend to each other.

It is a model of transformers: importing this module lets AutoConfig and AutoModel load its folders. Names of modules that METER
trains at a rate of their own begin with `cross_modal`; in a layer the names are BERT's, whose layers they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, BertConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bert.modeling_bert import BertLayer

MODEL_TYPE = "co_attention"
TEXT, IMAGE = range(2)  # rows of the type embeddings
HIDDEN = -10_000.0  # what is added to the score of a key that is padding


class CoAttentionConfig(PretrainedConfig):
    """The sizes of a model of two streams.

    Attributes:
        text_config: of the text encoder, a bidirectional model of transformers; a mapping, as in config.json, will do.
        image_width: d_v of the image's tokens.
        hidden_size, num_attention_heads, intermediate_size: of the layers in which the streams attend to each other.
        num_hidden_layers: of these in each stream.
        hidden_dropout_prob, attention_probs_dropout_prob: in these layers.
        vision_fingerprint: sha256 of the vision model whose tokens it was trained with; None: of none.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        image_width: int = 768,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        vision_fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PretrainedConfig):
            values = dict(text_config or {})
            text_config = CONFIG_MAPPING[values.pop("model_type", "roberta")](**values)
        self.text_config = text_config
        self.image_width = image_width
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.vision_fingerprint = vision_fingerprint
        self.max_position_embeddings = getattr(text_config, "max_position_embeddings", None)  # of the text, as everywhere
        super().__init__(**kwargs)


class Stream(nn.Module):
    """One modality: its tokens' projection to the width H of both, its layers with weights of their own, its pooler.

    `layers` are called one by one, since each reads what the other stream was before it.
    """

    def __init__(self, config: CoAttentionConfig, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, config.hidden_size)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    def pooled(self, hidden_states: Tensor) -> Tensor:
        """tanh(W s + b) of the state s of the first token: (B, L, H) -> (B, H)."""
        return self.pooler(hidden_states[:, 0]).tanh()


def _layer(config: CoAttentionConfig) -> BertLayer:
    """Self-attention, attention to the other stream, and a feed-forward part with exact GELU, a norm after each."""
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_dropout_prob", "attention_probs_dropout_prob")
    layer = BertLayer(
        BertConfig(
            **{name: getattr(config, name) for name in names},
            layer_norm_eps=config.layer_norm_eps,
            hidden_act="gelu",
            is_decoder=True,  # what has attention to another stream is called so there
            add_cross_attention=True,
            attn_implementation=config._attn_implementation,
        )
    )
    layer.attention.self.is_causal = False
    return layer


class CoAttentionModel(PreTrainedModel):
    """Text and an image's tokens in; the states of both streams, and one vector of each, out.

    Both streams read the state that the other one had before the layer. Where a call has no image, its stream is one token of
    zeros, before the projection.
    """

    config_class = CoAttentionConfig
    base_model_prefix = "co_attention"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["BertLayer"]

    def __init__(self, config: CoAttentionConfig) -> None:
        super().__init__(config)
        self.text_encoder = AutoModel.from_config(config.text_config, attn_implementation=config._attn_implementation)
        if getattr(self.text_encoder, "pooler", None) is not None:
            self.text_encoder.pooler = None  # RoBERTa ships no weights for it
        self.type_embeddings = nn.Embedding(2, config.hidden_size)
        self.cross_modal_text = Stream(config, config.text_config.hidden_size)
        self.cross_modal_image = Stream(config, config.image_width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the text."""
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace those of the text."""
        self.text_encoder.set_input_embeddings(value)

    @property
    def streams(self) -> dict[str, Stream]:
        """The two by their names."""
        return {"cross_modal_text": self.cross_modal_text, "cross_modal_image": self.cross_modal_image}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The text's states (B, L_t, H), and (B, 2 H) of both streams' poolers, the text's first.

        Shapes: input_ids (B, L_t) int64, or in their place inputs_embeds (B, L_t, d); attention_mask (B, L_t), 0 at padding;
        image_embeds (B, L_v, image_width), the class token first.
        """
        encoded = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        text = encoded.last_hidden_state  # (B, L_t, d)
        if image_embeds is None:
            image_embeds = text.new_zeros(len(text), 1, self.config.image_width)
        mask = None
        if attention_mask is not None:
            mask = (1 - attention_mask[:, None, None].to(text.dtype)) * HIDDEN  # (B, 1, 1, L_t)
        types = self.type_embeddings.weight
        text = self.cross_modal_text.transform(text) + types[TEXT]
        image = self.cross_modal_image.transform(image_embeds) + types[IMAGE]
        text, image = self.fused(text, image, mask)
        pooled = torch.cat([self.cross_modal_text.pooled(text), self.cross_modal_image.pooled(image)], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=text, pooler_output=pooled)

    def fused(self, text: Tensor, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both streams after their layers: text (B, L_t, H) and image (B, L_v, H), and what is added to scores of the text's
        keys, (B, 1, 1, L_t) -> the same shapes."""
        for of_text, of_image in zip(self.cross_modal_text.layers, self.cross_modal_image.layers, strict=True):
            text, image = (
                of_text(text, mask, image),  # positional, for gradient checkpointing
                of_image(image, None, text, mask),
            )
        return text, image


def has_image_stream(text_model: nn.Module) -> bool:
    """Whether a text model, or what a method has made of it, reads an image's tokens in a stream of their own."""
    return getattr(getattr(text_model, "config", None), "model_type", None) == MODEL_TYPE


AutoConfig.register(MODEL_TYPE, CoAttentionConfig)
AutoModel.register(CoAttentionConfig, CoAttentionModel)
