"""Reading COCO caption files (https://cocodataset.org/#format-data), the ids in COCO's image names, and Karpathy's splits."""

from __future__ import annotations

import re
from pathlib import Path

from routevl.data.records import INTEGER, STRING, Format, Record, check_unique, list_of, object_of
from routevl.errors import RoutevlError

IMAGE_NAME = re.compile(r"(?:.*_)?(\d{12})\.(?:jpg|jpeg|png)", re.IGNORECASE)
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}

CAPTIONS = Format(
    "a COCO captions file",
    object_of(
        "images", "licenses",
        annotations=list_of(id=INTEGER, image_id=INTEGER, caption=STRING),
        images=list_of(id=INTEGER, file_name=STRING),
        licenses=list_of(),
    ),
)  # fmt: skip
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


def read_karpathy_splits(path: str | Path) -> dict[int, str]:
    """Read Karpathy's dataset_coco.json: image id to "train" (which takes in "restval"), "val" or "test".

    Raises:
        RoutevlError: the file is missing or malformed, or a cocoid is used twice.
    """
    images = KARPATHY.read(path)["images"]
    check_unique(path, "cocoid", images)
    return {image["cocoid"]: KARPATHY_SPLITS[image["split"]] for image in images}


def images_in_folder(folder: str | Path) -> dict[int, str]:
    """The images of a folder (not of its subfolders) by the id in their names, image id to file name.

    A name is COCO's: `000000000139.jpg` or `COCO_val2014_000000000139.jpg`, with any text before the
    underscore; the endings jpg, jpeg and png count. Other files are ignored.

    Raises:
        RoutevlError: the folder does not exist, or two files have the same id.
    """
    names: dict[int, str] = {}
    for name in file_names(folder):
        if match := IMAGE_NAME.fullmatch(name):
            first = names.setdefault(int(match[1]), name)
            if first != name:
                raise RoutevlError(f"{folder}: {first} and {name} have the same image id {int(match[1])}")
    return names


def file_names(folder: str | Path) -> list[str]:
    """The sorted names of a folder's entries; a RoutevlError where it does not exist or cannot be listed."""
    try:
        return sorted(entry.name for entry in Path(folder).iterdir())
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise RoutevlError(f"{folder}: expected a folder of images ({getattr(error, 'strerror', error)})") from error
