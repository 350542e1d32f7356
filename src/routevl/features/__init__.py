"""Frozen visual features, computed once per image and stored: shards of safetensors and an index.

extract  one shard: a contiguous slice of all images, sorted by id
index    the index over all shards of one backbone
store    reading by image id, memory-mapped
images   the lists of images, and the images
"""
