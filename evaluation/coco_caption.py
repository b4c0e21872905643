"""The Java programs of pycocoevalcap: the PTB tokenizer and METEOR 1.5."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pycocoevalcap
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS
from tqdm import tqdm

UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")  # Java's default is the locale's


class JavaError(Exception):
    """A Java program cannot run or has failed; the message says why."""


@functools.cache
def java_missing():
    """The reason why Java programs cannot run here, "" if they can."""
    try:
        works = subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        return "java is not in the PATH"
    # macOS has a `java` that only says how to install Java.
    return "" if works else "java -version fails"


def program_folder(name):
    """The folder of pycocoevalcap with the program `name`; JavaError if that cannot run here."""
    if reason := java_missing():
        raise JavaError(reason)
    return Path(pycocoevalcap.__path__[0]) / name


def tokenize(captions):
    """
    Captions (strings) -> lists of lower-case words without punctuation.

    The result equals that of pycocoevalcap's PTBTokenizer, which is not called because it writes
    its input to its installation folder. Raises JavaError.
    """
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    program = ("-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer")
    done = subprocess.run(
        ["java", *UTF8, *program, "-preserveLines", "-lowerCase"],
        cwd=program_folder("tokenizer"),
        input=lines.encode(errors="replace"),
        capture_output=True,
    )
    found = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(found) != len(captions):
        raise JavaError(f"the PTB tokenizer failed ({_last_line(done.stderr)})")
    return [[word for word in line.split() if word not in PUNCTUATIONS] for line in found]


def meteor(references, systems):
    """
    METEOR, 0..1: per system, the score of all N images and a list of each image's own. Raises
    JavaError.

    references: per image a list of captions; systems: each N captions; a caption is a list of words
    """
    folder = program_folder("meteor")
    with tempfile.TemporaryDirectory() as scratch:
        errors = Path(scratch, "errors")
        # METEOR takes the path of its program from a URL without decoding it, so it would not find
        # its data under a path with a space, % or é.
        if not re.fullmatch(r"[\w./-]+", str(folder), re.ASCII):
            folder = shutil.copytree(folder, Path(scratch, "meteor"))
        program = ("-Xmx2G", "-jar", f"{folder}/meteor-1.5.jar", *"- - -stdio -l en -norm".split())
        with open(errors, "wb") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            process = subprocess.Popen(["java", *UTF8, *program], **pipes)
        try:
            return [_meteor_of(process, references, captions) for captions in systems]
        except (OSError, ValueError):  # it has exited, or its answer is not a number
            process.kill()
            process.wait()
            reason = _last_line(errors.read_bytes())
            raise JavaError(f"METEOR failed ({reason}); it needs 2 GB of memory") from None
        finally:
            process.kill()
            process.communicate()


def _meteor_of(process, references, captions):
    """The METEOR of one set of captions, and of each caption, from the running program"""

    def send(command, *texts):
        # A text must contain neither line breaks nor the program's separator.
        texts = [" ".join(text.replace("|||", "").split()) for text in texts]
        process.stdin.write((" ||| ".join([command, *texts]) + "\n").encode(errors="replace"))
        process.stdin.flush()

    statistics = []  # of each caption, which METEOR sums over the images
    pairs = list(zip(references, captions))
    for texts, words in tqdm(pairs, "METEOR", delay=2, leave=False, disable=None):
        send("SCORE", *(" ".join(text) for text in (*(texts or [[]]), words)))
        statistics.append(process.stdout.readline().decode())
    send("EVAL", *statistics)
    *each, total = [float(process.stdout.readline()) for _ in range(len(pairs) + 1)]
    return total, each


def _last_line(text):
    """The last line that a Java program printed, without its stack trace."""
    lines = text.decode(errors="replace").strip().splitlines()
    return next((line for line in lines[::-1] if not line.startswith("\tat ")), "no message")
