"""SPViT (He et al., 2021): a vision transformer whose attentions become convolutions, and whose feed-forward parts narrower,
where a search finds that it can do without."""
