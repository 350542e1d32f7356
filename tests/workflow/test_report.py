"""The report of `snakemake --report`, read in a real browser that reaches no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml
from synthetic_results import RUNS, make_figure, make_table, write_results, write_sheet
from tiny_project import BIN, PROJECT, copy_project, environment

from routevl.reporting.figures import FIGURES
from routevl.reporting.tables import TABLES

pytestmark = pytest.mark.slow

OFFLINE = ["--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"]  # nobody listens on the discard port
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,1000"
).split()
MENU, CONTENT = "//nav", "//div[contains(@class, 'h-screen') and contains(@class, 'overflow-auto') and not(self::nav)]"


class Browser:
    """Chromium, driven over the WebDriver protocol."""

    def __init__(self, driver: subprocess.Popen, profile: Path) -> None:
        assert driver.stdout is not None
        started = next(line for line in driver.stdout if "started successfully on port" in line)
        self._address = f"http://127.0.0.1:{started.rsplit(maxsplit=1)[1].rstrip('.')}"
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, *OFFLINE, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        session = self.call("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._address += f"/session/{session['sessionId']}"

    def call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def find(self, xpath: str) -> list[dict[str, str]]:
        return self.call("POST", "/elements", using="xpath", value=xpath)

    def wait_for(self, xpath: str) -> dict[str, str]:
        deadline = time.monotonic() + 20
        while not (found := self.find(xpath)):
            assert time.monotonic() < deadline, f"the page has no {xpath}"
            time.sleep(0.05)
        return found[0]

    def click(self, xpath: str) -> None:
        """Click an element as soon as it is there and stands still: the page moves and replaces what it shows."""
        deadline = time.monotonic() + 20
        while True:
            try:
                [element] = self.wait_for(xpath).values()
                return self.call("POST", f"/element/{element}/click")
            except HTTPError as error:
                assert time.monotonic() < deadline, error.read().decode()
                time.sleep(0.05)

    def click_for(self, xpath: str, brings: str) -> None:
        """Click until what it brings is there: a page that is just being drawn anew may swallow a click."""
        deadline = time.monotonic() + 60
        while not self.find(brings):
            assert time.monotonic() < deadline, f"{xpath} does not bring {brings}"
            self.click(xpath)
            pause = time.monotonic() + 3
            while not self.find(brings) and time.monotonic() < pause:
                time.sleep(0.05)

    def texts(self, xpath: str) -> list[str]:
        """The texts of all elements at one moment."""
        script = """
            const [xpath, done] = arguments;
            const found = document.evaluate(xpath, document, null, XPathResult.ORDERED_NODE_SNAPSHOT_TYPE);
            done(Array.from({length: found.snapshotLength}, (_, i) => found.snapshotItem(i).innerText.trim()));
        """
        return self.run(script, xpath)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/async", script=script, args=list(arguments))

    def requested(self) -> set[str]:
        """The addresses of all that any page has asked for since the start."""
        events = [json.loads(entry["message"])["message"] for entry in self.call("POST", "/se/log", type="performance")]
        return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}

    def close(self) -> None:
        self.call("DELETE", "")


@pytest.fixture(scope="module")
def chromium() -> None:
    """Skips the tests where there is none."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        assert os.environ.get("ROUTEVL_REQUIRE_BROWSER") != "1", "chromium and chromedriver are required and not installed"
        pytest.skip("chromium and chromedriver are not installed (Debian packages chromium and chromium-driver)")


@pytest.fixture(scope="module")
def project(chromium: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with synthetic results, and its report."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    shutil.copytree(PROJECT / "envs", folder / "envs", dirs_exist_ok=True)
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    text, vision = config["backbones"]["text"], config["backbones"]["vision"]
    config["backbones"] = {
        "text": {f"{name}_demo": text[name] for name in ("roberta", "gpt2", "bart")},
        "vision": {"vit_demo": vision["vit"]},
    }
    config["experiments"] = "results/experiments.tsv"
    (folder / "config/config.yaml").write_text(yaml.safe_dump(config))
    results = write_results(folder / "results", RUNS)
    write_sheet(results / "experiments.tsv", RUNS)
    for name in TABLES:
        make_table(name, results, results / f"tables/{name}.csv")
    for name in FIGURES:
        make_figure(name, results, results / f"figures/{name}.svg")
    provenance = "--results results --configuration {} --experiments results/experiments.tsv --output results/provenance.html"
    record = "record --manifest results/manifests/table/T1_vqa.json --outputs results/tables/T1_vqa.csv -- true"
    for command in (record, f"provenance {provenance}"):
        subprocess.run([BIN / "routevl", *command.split()], cwd=folder, env=environment(), check=True)
    made = subprocess.run(
        [BIN / "snakemake", "--report", "report.html"], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def browser(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The report, opened."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            with closing(Browser(driver, tmp_path_factory.mktemp("profile"))) as browser:
                browser.call("POST", "/url", url=(project / "report.html").as_uri())
                yield browser
        finally:
            driver.terminate()


def entries(browser: Browser, category: str) -> list[str]:
    """Go to a category by the menu; returns the labels of what it lists."""
    browser.click(f"{MENU}//nav//li[1]/a")  # home
    browser.click(f"{MENU}//a[span = '{category}']")
    browser.wait_for(f"{MENU}//tbody/tr")
    return browser.texts(f"{MENU}//tbody/tr/td[1]")


def show(browser: Browser, label: str, content: str) -> dict[str, str]:
    """Open an entry of the menu; returns the content that it brings, by its xpath."""
    browser.click_for(f"{MENU}//tbody/tr[td[1] = '{label}']/td[last()]//a[1]", f"{CONTENT}//{content}")
    return browser.wait_for(f"{CONTENT}//{content}")


def test_every_figure_is_drawn(browser: Browser) -> None:
    assert sorted(entries(browser, "Figures")) == sorted(FIGURES)
    for name in FIGURES:
        image = show(browser, name, f"img[contains(@src, 'filename={name}.svg')]")
        script = "const [image, done] = arguments; image.decode().then(() => done(image.naturalWidth), () => done(0));"
        assert browser.run(script, image) > 100, name


def test_every_table_is_a_table_with_its_rows(project: Path, browser: Browser) -> None:
    assert entries(browser, "Tables") == list(TABLES)
    for name in TABLES:
        browser.call("POST", "/frame", id=show(browser, name, f"iframe[contains(@src, 'filename={name}.html')]"))
        browser.wait_for(f"//h1[starts-with(., '{name}')]")
        lines = (project / f"results/tables/{name}.md").read_text(encoding="utf-8").splitlines()
        header, *rows = [line for line in lines if line.startswith("| ") and set(line) - set("|:- ")]
        cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
        assert browser.texts("//thead//th") == [cell.strip() for cell in header.strip("|").split(" | ")]
        assert browser.texts("//tbody/tr/td[1]") == [row[0] for row in cells]
        assert browser.texts("//tbody/tr[last()]/td") == cells[-1]
        browser.call("POST", "/frame", id=None)


def test_an_auditor_sees_what_made_it(browser: Browser) -> None:
    assert entries(browser, "Audit") == ["environment lock", "provenance", "run sheet"]
    browser.call("POST", "/frame", id=show(browser, "provenance", "iframe[contains(@src, 'filename=provenance.html')]"))
    browser.wait_for("//h1[. = 'What made the results']")
    assert len(browser.find("//table[3]/tbody/tr")) == len(RUNS)
    browser.call("POST", "/frame", id=None)


def test_every_result_has_its_caption(project: Path, browser: Browser) -> None:
    for name in (*TABLES, *FIGURES):
        entries(browser, "Tables" if name in TABLES else "Figures")
        browser.click_for(f"{MENU}//tbody/tr[td[1] = '{name}']/td[last()]//a[2]", f"{MENU}//li[contains(@class, 'prose')]")
        first_words = " ".join((project / f"workflow/report/{name}.rst").read_text(encoding="utf-8").split()[:4])
        assert first_words in " ".join(browser.texts(f"{MENU}//li[contains(@class, 'prose')]")), name


def test_nothing_is_asked_of_the_network(browser: Browser) -> None:
    """The last test: it looks back on all that was opened before."""
    requested = {address.split(":", 1)[0] for address in browser.requested()}
    assert requested <= {"file", "data", "blob", "chrome"} and "data" in requested
