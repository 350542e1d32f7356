"""The data: official COCO caption and VQAv2 files, the demo world of shapes, the preparation of splits."""
