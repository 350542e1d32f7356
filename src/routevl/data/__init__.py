"""The data: official files of COCO captions, VQAv2, GQA and NLVR2, the demo world of shapes, the preparation of splits."""
