"""Reading COCO caption files (https://cocodataset.org/#format-data), lists of images, and Karpathy's splits."""

from __future__ import annotations

from pathlib import Path

from routevl.data.records import INTEGER, STRING, Format, Record, check_unique, list_of, object_of
from routevl.errors import RoutevlError

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}

IMAGE = {"id": INTEGER, "file_name": STRING}
CAPTIONS = Format(
    "a COCO captions file",
    object_of(
        "images", "licenses",
        annotations=list_of(id=INTEGER, image_id=INTEGER, caption=STRING),
        images=list_of(**IMAGE),
        licenses=list_of(),
    ),
)  # fmt: skip
IMAGE_LIST = Format(
    'a list of images, of {"id", "file_name"}, or an object with such a list as its "images"',
    object_of(images=list_of(**IMAGE)) | {"type": ["object", "array"], "items": object_of(**IMAGE)},
)
# https://cs.stanford.edu/people/karpathy/deepimagesent
KARPATHY = Format(
    "Karpathy's dataset_coco.json", object_of(images=list_of(cocoid=INTEGER, split={"enum": list(KARPATHY_SPLITS)}))
)


def read_captions(path: str | Path) -> Record:
    """Read a COCO captions file.

    Returns:
        the file's object; "annotations" is a list of {"id": int, "image_id": int, "caption": str, ...} and
        "images", where the file has it, a list of {"id": int, "file_name": str, ...}.

    Raises:
        RoutevlError: the file is missing or malformed, an id is used twice, or a caption's image is not in "images".
    """
    content = CAPTIONS.read(path)
    check_unique(path, "id", content["annotations"])
    if "images" in content:
        check_unique(path, "id", content["images"])
        known = {image["id"] for image in content["images"]}
        for caption in content["annotations"]:
            if caption["image_id"] not in known:
                raise RoutevlError(f"{path}: the image_id {caption['image_id']} of a caption is not in 'images'")
    return content


def read_image_list(path: str | Path) -> list[Record]:
    """The images of a list, or of any file of COCO's that has "images", as {"id": int, "file_name": str, ...}.

    Raises:
        RoutevlError: the file is missing or malformed, or an id is used twice.
    """
    content = IMAGE_LIST.read(path)
    images = content["images"] if isinstance(content, dict) else content
    check_unique(path, "id", images)
    return images


def read_karpathy_splits(path: str | Path) -> dict[int, str]:
    """Read Karpathy's dataset_coco.json: image id to "train" (which takes in "restval"), "val" or "test".

    Raises:
        RoutevlError: the file is missing or malformed, or a cocoid is used twice.
    """
    images = KARPATHY.read(path)["images"]
    check_unique(path, "cocoid", images)
    return {image["cocoid"]: KARPATHY_SPLITS[image["split"]] for image in images}
