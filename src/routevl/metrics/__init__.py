"""The official scores of the two tasks: VQA accuracy and the COCO caption metrics."""
