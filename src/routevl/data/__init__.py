"""The data: official COCO caption and VQAv2 files, the demo world of shapes, and the preparation of splits."""
