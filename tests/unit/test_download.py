"""Downloads from a server of our own that misbehaves in every way, and archives that do."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import run_stage

from routevl.data import download
from routevl.data.datasets import read_datasets
from routevl.data.download import MB
from routevl.errors import RoutevlError
from routevl.files import read_json

REPOSITORY = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)
CONTENT = bytes(range(256)) * 1200
OTHER = CONTENT[::-1]
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Resource:
    """What the server does about one path.

    Attributes:
        ranges: whether it knows the header Range.
        ends_after: of each coming answer, after how many bytes of the body the connection ends.
        stalls_after: after how many bytes of the body nothing more comes, until the server is told to go on.
    """

    content: bytes
    ranges: bool = True
    ends_after: list[int] = field(default_factory=list)
    stalls_after: int | None = None


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.resources: dict[str, Resource] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        self.go_on = threading.Event()

    def add(self, path: str, *arguments, **options) -> str:
        """Serve a resource; returns its address."""
        self.resources[path] = Resource(*arguments, **options)
        return self.url(path)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requests.append((self.path, asked))
        resource = self.server.resources.get(self.path)
        if resource is None:
            return self.send_error(404)
        length, start = len(resource.content), 0
        if asked and resource.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= length:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(length - start))
        self.end_headers()
        self._send_body(resource, resource.content[start:])

    def _send_body(self, resource: Resource, body: bytes) -> None:
        if resource.ends_after:
            body = body[: resource.ends_after.pop(0)]
        if resource.stalls_after is not None:
            self.wfile.write(body[: resource.stalls_after])
            self.server.go_on.wait()
            return
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


def row(**changes: str) -> dict[str, str]:
    values = {
        "dataset": "Test data",
        "file": "data.zip",
        "folder": "data",
        "urls": "http://127.0.0.1/data.zip",
        "checksum": SHA256,
        "bytes": str(len(CONTENT)),
        "licence": "CC0",
        "terms": "https://example.org/terms",
    }
    return values | changes


def write_table(path: Path, *rows: dict[str, str]) -> Path:
    lines = [rows[0].keys(), *(entry.values() for entry in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


Download = Callable[..., dict]


@pytest.fixture
def get(tmp_path: Path) -> Download:
    """Download data.zip from some addresses into tmp_path/downloads; returns the record."""

    def run(*urls: str, timeout: float = 30, **changes: str) -> dict:
        table = write_table(tmp_path / "table.tsv", row(urls=",".join(urls), **changes))
        record = tmp_path / "record.json"
        record.unlink(missing_ok=True)
        where = ("--datasets", table, "--folder", tmp_path / "downloads", "--record", record)
        run_stage("download", *where, "--file", "data.zip", "--timeout", timeout)
        return read_json(record)

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the download belongs."""
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads" / "data.zip"


def visible(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}


# ------------------------------------------------------------------------------------------------ downloading


def test_a_download_is_verified_and_recorded(server: Server, get: Download, path: Path) -> None:
    url = server.add("/data.zip", CONTENT)
    assert get(url) == {
        "file": "data.zip",
        "url": url,
        "sha256": SHA256.removeprefix("sha256:"),
        "bytes": len(CONTENT),
        "checksum": "verified",
        "licence": "CC0",
    }
    assert path.read_bytes() == CONTENT and visible(path.parent) == {"data.zip"}


def test_an_ended_connection_is_gone_on_from(server: Server, get: Download, path: Path) -> None:
    url = server.add("/data.zip", CONTENT, ends_after=[100_000, 7])
    assert get(url)["checksum"] == "verified"
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=100007-"]


def test_a_server_that_cannot_go_on_begins_again(server: Server, get: Download, path: Path) -> None:
    get(server.add("/data.zip", CONTENT, ranges=False, ends_after=[100_000]))
    assert path.read_bytes() == CONTENT


def test_a_file_without_a_checksum_is_begun_again(server: Server, get: Download, path: Path) -> None:
    """Nothing else could tell that two parts are of the same file."""
    get(server.add("/data.zip", CONTENT, ends_after=[100_000]), checksum="", bytes="")
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, None]


def test_what_was_complete_when_the_process_died_is_not_asked_for_again(
    server: Server, get: Download, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.add("/data.zip", CONTENT)

    def stop(_: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "sha256_of", stop)
        get(url)
    assert get(url)["url"] == url
    assert path.read_bytes() == CONTENT and len(server.requests) == 1


def test_more_interruptions_than_retries_while_it_gets_further(server: Server, get: Download, path: Path) -> None:
    url = server.add("/data.zip", CONTENT, ends_after=[10_000] * 12)
    get(url)
    assert path.read_bytes() == CONTENT and len(server.requests) == 13


def test_a_server_that_never_gets_further_is_given_up(server: Server, get: Download, path: Path) -> None:
    url = server.add("/data.zip", CONTENT, ranges=False, ends_after=[10_000] * 100)
    with pytest.raises(RoutevlError, match=f"the connection ended after 10000 of {len(CONTENT)} bytes"):
        get(url)
    assert len(server.requests) == 2 + download.RETRIES


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_on_the_server_is_begun_again(
    server: Server, get: Download, path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.add("/data.zip", OTHER, ends_after=[100_000, 0])
    with monkeypatch.context() as patch, pytest.raises(RoutevlError, match="the connection ended after 100000"):
        patch.setattr(download, "RETRIES", 0)
        get(url)
    server.requests.clear()
    get(server.add("/data.zip", CONTENT, ranges=ranges))
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=100000-", None][: 1 + ranges]


def test_a_file_that_became_shorter(server: Server, get: Download, path: Path) -> None:
    """The rest that is asked for does not exist any more (HTTP 416)."""
    path.with_name("data.zip.part").write_bytes(CONTENT + OTHER[:5])
    get(server.add("/data.zip", CONTENT))
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [f"bytes={len(CONTENT) + 5}-", None]


def failing(server: Server, kind: str) -> str:
    """An address that does not serve the right file, in one of several ways."""
    path = f"/{kind}/data.zip"
    if kind == "missing":
        return server.url(path)
    if kind == "refused":
        return "http://127.0.0.1:9/data.zip"  # the discard port, on which nobody listens
    return {
        "wrong": lambda: server.add(path, OTHER),
        "wrong length": lambda: server.add("/wrong-length/data.zip", b"<html>moved</html>"),
        "hanging": lambda: server.add(path, CONTENT, stalls_after=0),
    }[kind]()


FAILURES = {
    "missing": "HTTP Error 404: Not Found",
    "refused": "Connection refused",
    "wrong": f"its checksum is sha256:{hashlib.sha256(OTHER).hexdigest()}, expected {SHA256}",
    "wrong length": f"the file has 18 bytes there, expected {len(CONTENT)}",
    "hanging": "timed out",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_the_next_address_is_tried(server: Server, get: Download, path: Path, kind: str) -> None:
    mirror = server.add("/mirror/data.zip", CONTENT)
    assert get(failing(server, kind), mirror, timeout=0.2)["url"] == mirror
    assert path.read_bytes() == CONTENT and visible(path.parent) == {"data.zip"}


def test_a_mirror_goes_on(server: Server, get: Download, path: Path) -> None:
    broken = server.add("/data.zip", CONTENT, ends_after=[100_000, 0, 0, 0, 0])
    mirror = server.add("/mirror/data.zip", CONTENT)
    assert get(broken, mirror)["url"] == mirror
    assert server.requests[-1] == ("/mirror/data.zip", "bytes=100000-")


def test_when_all_addresses_fail_one_message_says_all(server: Server, get: Download, path: Path, tmp_path: Path) -> None:
    urls = [failing(server, kind) for kind in FAILURES]
    with pytest.raises(RoutevlError) as error:
        get(*urls, timeout=0.2)
    assert "\n" not in str(error.value)
    for part in ("data.zip", *urls, *FAILURES.values(), SHA256, f"Put it at {path} by hand"):
        assert part in str(error.value)
    assert not path.exists() and not (tmp_path / "record.json").exists()


def test_a_killed_download_goes_on_to_the_same_bytes(server: Server, get: Download, path: Path, tmp_path: Path) -> None:
    content = os.urandom(3 * MB + 5)
    expected = {"checksum": "sha256:" + hashlib.sha256(content).hexdigest(), "bytes": str(len(content))}
    url = server.add("/data.zip", content, stalls_after=2 * MB + MB // 2)
    table = write_table(tmp_path / "table.tsv", row(urls=url, **expected))
    command = "from routevl.cli import main; main()"
    options = ("--datasets", table, "--file", "data.zip", "--folder", path.parent, "--record", tmp_path / "record.json")
    process = subprocess.Popen([sys.executable, "-c", command, "download", *map(str, options)])
    part = path.with_name("data.zip.part")
    while not (part.exists() and part.stat().st_size >= 2 * MB):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    held = part.stat().st_size
    server.resources["/data.zip"].stalls_after = None
    get(url, **expected)
    assert path.read_bytes() == content
    assert server.requests[1:] == [("/data.zip", f"bytes={held}-")]


def test_two_at_once_download_once(server: Server, get: Download, path: Path, tmp_path: Path) -> None:
    url = server.add("/data.zip", CONTENT)
    table = write_table(tmp_path / "table.tsv", row(urls=url))
    where = ("--datasets", table, "--file", "data.zip", "--folder", path.parent)
    records = [tmp_path / f"{name}.json" for name in "ab"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda record: run_stage("download", *where, "--record", record), records))
    assert len(server.requests) == 1 and all(read_json(record)["checksum"] == "verified" for record in records)


def test_a_file_that_is_given_on_request(get: Download, path: Path) -> None:
    with pytest.raises(RoutevlError) as error:
        get(checksum="", bytes="")
    place = f"Put it at {path} by hand (no checksum is known)"
    assert str(error.value) == f"data.zip is given on request alone (https://example.org/terms). {place}"
    path.write_bytes(CONTENT)
    assert get(checksum="", bytes="")["url"] == "placed by hand"


def test_a_full_disk_is_noticed_first(server: Server, get: Download, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/data.zip", CONTENT)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RoutevlError, match=r"downloads: data\.zip needs .* MB, but only .* MB are free"):
        get(url)
    assert not server.requests


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_wrong_timeouts(get: Download, timeout: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get("http://127.0.0.1/data.zip", timeout=timeout)
    assert "argument --timeout: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ placed by hand


def test_a_file_placed_by_hand_is_only_verified(server: Server, get: Download, path: Path) -> None:
    path.write_bytes(CONTENT)
    record = get(server.add("/data.zip", CONTENT))
    assert (record["url"], record["checksum"]) == ("placed by hand", "verified")
    assert not server.requests


@pytest.mark.parametrize(("content", "message"), [(OTHER, f"expected {SHA256}"), (CONTENT[:-1], "bytes, expected")])
def test_a_wrong_file_placed_by_hand_stays(server: Server, get: Download, path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(RoutevlError, match=message) as error:
        get(server.add("/data.zip", CONTENT))
    assert str(path) in str(error.value)
    assert path.read_bytes() == content and not server.requests


# ------------------------------------------------------------------------------------------------ no checksum known


@pytest.mark.parametrize("placed", [False, True])
def test_the_first_file_is_recorded_and_later_ones_must_agree(server: Server, get: Download, path: Path, placed: bool) -> None:
    unknown = {"checksum": "", "bytes": ""}
    url = server.add("/data.zip", CONTENT)
    if placed:
        path.write_bytes(CONTENT)
    assert get(url, **unknown)["checksum"] == "recorded"
    digest = SHA256.removeprefix("sha256:")
    assert path.with_name("data.zip.sha256").read_text() == f"{digest}  data.zip\n"
    path.write_bytes(OTHER)
    with pytest.raises(RoutevlError, match=f"expected {SHA256}"):
        get(url, **unknown)
    path.unlink()
    server.add("/data.zip", OTHER)
    with pytest.raises(RoutevlError, match=f"expected {SHA256}") as error:
        get(url, **unknown)
    assert str(error.value).endswith(f"by hand ({SHA256})")
    server.add("/data.zip", CONTENT)
    assert get(url, **unknown)["sha256"] == digest


# ------------------------------------------------------------------------------------------------ the table


def test_the_official_files_of_vqa_and_captioning_all_have_checksums_and_two_addresses() -> None:
    files = read_datasets(REPOSITORY / "config" / "datasets.tsv").values()
    known = [entry for entry in files if entry.dataset not in ("GQA 1.2", "NLVR2")]
    assert {entry.dataset for entry in known} == {"COCO 2014", "COCO 2017", "VQAv2", "Karpathy splits"}
    assert all(entry.checksum.startswith("sha256:") and entry.bytes and len(entry.urls) >= 2 for entry in known)
    assert all((entry.checksum == "") == (entry.bytes is None) for entry in files)
    assert [entry.file for entry in files if not entry.urls] == ["train_img.zip", "dev_img.zip", "test1_img.zip"]


@needs_reference
def test_the_table_knows_nlvr2s_dev_file() -> None:
    entry = read_datasets(REPOSITORY / "config" / "datasets.tsv")["dev.json"]
    content = gzip.decompress((REFERENCE / "nlvr2/dev.json.gz").read_bytes())
    assert (len(content), f"sha256:{hashlib.sha256(content).hexdigest()}") == (entry.bytes, entry.checksum)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row() | {"size": "3"}], "line 2: not a row of dataset, file, .* must not contain .'size'. properties"),
        ([{"file": "x"}], "line 2: .* must contain .'bytes', 'checksum', .* properties"),
        ([row(), row(file="b.zip")], "the folder data is there twice"),
        ([row(), row(folder="b")], r"the file data\.zip is there twice"),
        ([row(), {"x": "y"}], "line 3: .*data.file must be string"),
        ([row(file="../data.zip")], "line 2: .*data.file must match pattern"),
        ([row(file="data.tar.gz")], "line 2: .*data.file must match pattern"),
        ([row(folder="..")], "line 2: .*data.folder must match pattern"),
        ([row(urls=",")], "line 2: .*data.urls must match pattern"),
        ([row(urls="ftp://example.org/a")], "line 2: .*data.urls must match pattern"),
        ([row(urls="http://a/b, http://c/d")], "line 2: .*data.urls must match pattern"),
        ([row(checksum="sha256:abc")], "line 2: .*data.checksum must match pattern"),
        ([row(checksum="md5:" + "A" * 32)], "line 2: .*data.checksum must match pattern"),
        ([row(bytes="13 GB")], "line 2: .*data.bytes must match pattern"),
        ([row(bytes="9" * 5000)], "line 2: .*data.bytes must match pattern"),
        ([row(licence="")], "line 2: .*data.licence must match pattern"),
        ([row(terms="none")], "line 2: .*data.terms must match pattern"),
    ],
)
def test_wrong_tables(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    table = write_table(tmp_path / "table.tsv", *rows)
    with pytest.raises(RoutevlError, match=message) as error:
        read_datasets(table)
    assert str(table) in str(error.value)


def test_unreadable_tables(tmp_path: Path) -> None:
    with pytest.raises(RoutevlError, match="nowhere.tsv: not a readable table .* No such file"):
        read_datasets(tmp_path / "nowhere.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(RoutevlError, match="not a readable table"):
        read_datasets(tmp_path / "binary.tsv")


def test_a_file_that_is_not_in_the_table(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.tsv", row())
    where = ("--datasets", table, "--folder", tmp_path)
    for stage, output in (("download", "--record"), ("unpack", "--output")):
        with pytest.raises(RoutevlError, match=r"--file 'other\.zip' is not in .*table\.tsv, which has data\.zip"):
            run_stage(stage, *where, "--file", "other.zip", output, tmp_path / "output")


# ------------------------------------------------------------------------------------------------ unpacking


@pytest.fixture
def unpack(tmp_path: Path, path: Path) -> Callable[[], Path]:
    """Unpack `path` to tmp_path/output, and return that."""

    def run() -> Path:
        table = write_table(tmp_path / "table.tsv", row())
        output = tmp_path / "output"
        run_stage("unpack", "--datasets", table, "--file", "data.zip", "--folder", path.parent, "--output", output)
        return output

    return run


def write_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3  # Unix, whose file modes the attributes hold
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def test_an_archive_is_unpacked_as_a_whole(unpack: Callable[[], Path], path: Path) -> None:
    write_zip(path, ("train2014/", b""), ("train2014/a.jpg", CONTENT), ("b/c/d.json", b"{}"))
    (output := path.parent.parent / "output").mkdir()
    (output / "old").touch()
    with pytest.raises(RoutevlError, match="output: holds old and no train2014"):
        unpack()
    assert (output / "old").exists()
    (output / "old").rename(output / "train2014")  # as of an earlier unpacking
    unpack()
    assert {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()} == {"train2014/a.jpg", "b/c/d.json"}
    assert (output / "train2014/a.jpg").read_bytes() == CONTENT


@pytest.mark.parametrize("member", ["../outside", "a/../../outside", "/outside", "..\\outside", link("outside")])
def test_nothing_is_unpacked_outside_the_folder(unpack: Callable[[], Path], path: Path, member: str | zipfile.ZipInfo) -> None:
    write_zip(path, ("first", b"1"), (member, b"../../data.zip"))
    before = {file for file in path.parent.parent.rglob("*") if file.name != "table.tsv"}
    output = unpack()
    unpacked = set(output.rglob("*"))
    assert {file for file in path.parent.parent.rglob("*") if file.name != "table.tsv"} == before | unpacked | {output}
    assert len([file for file in unpacked if file.is_file()]) == 2 and not any(file.is_symlink() for file in unpacked)
    assert not Path("/outside").exists()


def encrypted(content: bytes) -> bytes:
    place = content.index(b"PK\x01\x02") + 8  # the flags in the central directory
    return content[:place] + b"\x01" + content[place + 1 :]


def corrupt(content: bytes) -> bytes:
    return content[:40] + bytes([content[40] ^ 255]) + content[41:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[: len(content) // 2], "a damaged archive, or not a zip archive"),
        (lambda content: b"<html>moved</html>", "a damaged archive, or not a zip archive"),
        (lambda content: b"", "a damaged archive, or not a zip archive"),
        (corrupt, "a damaged archive.*Bad CRC-32 for file 'first'"),
        (encrypted, "'first'.* is encrypted"),
    ],
)
def test_damaged_archives(unpack: Callable[[], Path], path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # stored as it is, so that a changed byte changes the checksum alone
        archive.writestr("first", CONTENT)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(RoutevlError, match=message) as error:
        unpack()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (path.parent.parent / "output").exists()


def test_a_file_that_is_no_archive_stands_in_its_folder_as_it_is(path: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.tsv", row(file="dev.json"))
    path.with_name("dev.json").write_bytes(CONTENT)
    where = ("--datasets", table, "--file", "dev.json", "--folder", path.parent, "--output", tmp_path / "output")
    for _ in range(2):
        run_stage("unpack", *where)
        assert [(file.name, file.read_bytes()) for file in (tmp_path / "output").iterdir()] == [("dev.json", CONTENT)]


def test_an_archive_that_is_not_there(unpack: Callable[[], Path], path: Path) -> None:
    with pytest.raises(RoutevlError, match=r"data\.zip: no such file \(routevl download gets it\)"):
        unpack()


def test_an_archive_that_does_not_fit_on_the_disk(
    unpack: Callable[[], Path], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zip(path, ("large", bytes(5 * MB)))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": MB}))
    with pytest.raises(RoutevlError, match="needs 5 MB, but only 1 MB are free"):
        unpack()
