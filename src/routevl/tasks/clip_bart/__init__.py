"""CLIP-BART: BART reads grid features of CLIP beside a text and writes answers and captions (Sung et al., arXiv 2112.06825)."""
