"""The official scores of VQAv2, COCO captions, GQA and NLVR2."""
