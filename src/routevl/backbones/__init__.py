"""The frozen backbones: text models of transformers, vision models of timm or transformers.

A backbone is a folder in its library's own format. The stage `fetch-backbone` makes one of a model of the Hugging Face hub,
pinned by a revision; `pretrain-text` and `pretrain-vision` make the demo's own small ones. Only safetensors weights are read,
never pickles.
"""
