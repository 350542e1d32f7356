"""Finding the file of an image in a folder: by the name that it is given somewhere, else by its id; or by several names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

from routevl.errors import RoutevlError

NUMBERED = re.compile(r"(?:.*_)?([0-9]{12})")  # 000000000139 or COCO_val2014_000000000139, with any text before the underscore


@cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the files that Pillow reads."""
    from PIL import Image  # late: its plugins take time to load, and images with names are found without

    return frozenset(ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN)


class ImageFolder:
    """A folder of images, not of its subfolders but for names that lead into these.

    Attributes:
        folder: its path.
        names: of its entries.

    Raises:
        RoutevlError: the folder does not exist or cannot be listed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._by_stem: dict[str, dict[str, list[str]]] = {}
        try:
            self.names = frozenset(os.listdir(self.folder))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise RoutevlError(f"{folder}: expected a folder of images ({getattr(error, 'strerror', error)})") from error

    @cached_property
    def numbered(self) -> dict[int, list[str]]:
        """The files with a 12-digit id in their names, by it, as `NUMBERED` describes them; others are ignored."""
        found = defaultdict(list)
        for name in sorted(self.names):
            stem, ending = os.path.splitext(name)
            if ending.lower() in image_endings() and (match := NUMBERED.fullmatch(stem)):
                found[int(match[1])].append(name)
        return dict(found)

    def find(self, image_id: int, file_name: str | None = None) -> Path | None:
        """The file of an image, or None where there is none.

        It is looked for by `file_name`, then by the last part of that, which may be a path of Windows or a web address, then by
        the id in the files' names, unless `file_name` holds another one.

        Raises:
            RoutevlError: it is looked for by its id, and two files have this.
        """
        if file_name is not None:
            if file_name in self.names or os.path.isfile(self.folder / file_name):
                return self.folder / file_name
            if (last := _last_part(file_name)) in self.names:
                return self.folder / last
        names = self.numbered.get(image_id, []) if _may_have(file_name, image_id) else []
        if len(names) > 1:
            raise RoutevlError(f"{self.folder}: {names[0]} and {names[1]} have the same image id {image_id}")
        return self.folder / names[0] if names else None

    def find_named(self, names: Sequence[str]) -> Path | None:
        """The file of an image that may have one of these names, paths below the folder; None where there is none.

        The first name counts whose file is there, with the ending of the name or another one of images.

        Raises:
            RoutevlError: two files differ from the name in their endings alone.
        """
        for name in names:
            below, last = os.path.split(name)
            files = self._files_by_stem(below).get(os.path.splitext(last)[0], [])
            if last not in files and len(files) > 1:
                raise RoutevlError(
                    f"{self.folder / below}: {files[0]} and {files[1]} may both be the image {name}; move one away"
                )
            if files:
                return self.folder / below / (last if last in files else files[0])
        return None

    def _files_by_stem(self, below: str) -> dict[str, list[str]]:
        """The files of images in a folder below this one by their names without the ending; none where it does not exist."""
        if below not in self._by_stem:
            found = defaultdict(list)
            try:
                names = os.listdir(self.folder / below) if below else self.names
            except (OSError, ValueError):
                names = ()
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending.lower() in image_endings():
                    found[stem].append(name)
            self._by_stem[below] = dict(found)
        return self._by_stem[below]

    def looked_for(self, image_id: int, file_name: str | None) -> str:
        """What `find` looks for, for a message that there is no such file."""
        names = [] if file_name is None else [file_name, _last_part(file_name)]
        names += [f"[..._]{image_id:012d}.jpg (or another ending of images)"] if _may_have(file_name, image_id) else []
        return f"{self.folder}: " + " or ".join(dict.fromkeys(names))


def _last_part(file_name: str) -> str:
    path = file_name.partition("?")[0] if "://" in file_name else file_name
    return re.split(r"[/\\]", path)[-1]


def _may_have(file_name: str | None, image_id: int) -> bool:
    """Whether an image of this name may have the id: False where the name holds the 12-digit id of another one."""
    match = NUMBERED.fullmatch(os.path.splitext(_last_part(file_name or ""))[0])
    return match is None or int(match[1]) == image_id
