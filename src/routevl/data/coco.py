"""Reading COCO caption files (https://cocodataset.org/#format-data), the ids in COCO's image names, and Karpathy's splits."""

from __future__ import annotations

import re
from pathlib import Path

from routevl.data.records import Record, check_unique, checked_records, read_object
from routevl.errors import RoutevlError

IMAGE_NAME = re.compile(r"(?:.*_)?(\d{12})\.(?:jpg|jpeg|png)", re.IGNORECASE)
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_captions(path: str | Path) -> Record:
    """Read and check a COCO captions file, plain or gzip-compressed.

    Returns:
        the file's object; "annotations" is a list of {"id": int, "image_id": int, "caption": str, ...} and
        "images", where the file has it, a list of {"id": int, "file_name": str, ...}.

    Raises:
        RoutevlError: the file is missing or not JSON, an entry lacks a key or has it with another type, an
            id is used twice, or a caption's image is not in "images".
    """
    content = read_object(path, "a COCO captions file")
    captions = checked_records(path, content, "annotations", {"id": int, "image_id": int, "caption": str})
    check_unique(path, "annotations", "id", captions)
    if "images" in content:
        images = checked_records(path, content, "images", {"id": int, "file_name": str})
        check_unique(path, "images", "id", images)
        _check_images_listed(path, captions, {image["id"] for image in images})
    if "licenses" in content:
        checked_records(path, content, "licenses", {})
    return content


def _check_images_listed(path: str | Path, captions: list[Record], image_ids: set[int]) -> None:
    for index, caption in enumerate(captions):
        if caption["image_id"] not in image_ids:
            image_id = caption["image_id"]
            raise RoutevlError(f"{path}: annotations[{index}]: the image_id {image_id} is not in 'images'")


def read_karpathy_splits(path: str | Path) -> dict[int, str]:
    """Read and check Karpathy's dataset_coco.json (https://cs.stanford.edu/people/karpathy/deepimagesent).

    Returns:
        image id to "train" (which takes in "restval"), "val" or "test".

    Raises:
        RoutevlError: the file is missing or not JSON, an image lacks its cocoid or split, a cocoid is used
            twice, or a split is unknown.
    """
    content = read_object(path, "Karpathy's dataset_coco.json")
    images = checked_records(path, content, "images", {"cocoid": int, "split": str})
    check_unique(path, "images", "cocoid", images)
    for index, image in enumerate(images):
        if image["split"] not in KARPATHY_SPLITS:
            found = f"must be one of {tuple(KARPATHY_SPLITS)}, found {image['split']!r}"
            raise RoutevlError(f"{path}: images[{index}]['split'] {found}")
    return {image["cocoid"]: KARPATHY_SPLITS[image["split"]] for image in images}


def images_in_folder(folder: str | Path) -> dict[int, str]:
    """The images of a folder (not of its subfolders) by the id in their names.

    A name is COCO's: `000000000139.jpg` or `COCO_val2014_000000000139.jpg`, with any text before the
    underscore; the endings jpg, jpeg and png count. Other files are ignored.

    Returns:
        image id to file name.

    Raises:
        RoutevlError: the folder does not exist, or two files have the same id.
    """
    names: dict[int, str] = {}
    for name in file_names(folder):
        match = IMAGE_NAME.fullmatch(name)
        if match is None:
            continue
        image_id = int(match[1])
        if image_id in names:
            raise RoutevlError(f"{folder}: {names[image_id]} and {name} have the same image id {image_id}")
        names[image_id] = name
    return names


def file_names(folder: str | Path) -> list[str]:
    """The sorted names of a folder's entries.

    Raises:
        RoutevlError: the folder does not exist or cannot be listed.
    """
    try:
        return sorted(entry.name for entry in Path(folder).iterdir())
    except OSError as error:
        raise RoutevlError(f"{folder}: expected a folder of images ({error.strerror})") from error
