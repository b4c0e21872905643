"""The Java programs of pycocoevalcap: the PTB tokenizer and METEOR 1.5."""

import functools
import re
import shutil
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pycocoevalcap
from tqdm import tqdm

# As in pycocoevalcap. The tokenizer writes -lrb- and so on in lower case, so brackets are kept.
PUNCTUATION = {
    "''",
    "'",
    "``",
    "`",
    "-LRB-",
    "-RRB-",
    "-LCB-",
    "-RCB-",
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "...",
    ";",
}
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


def _folder(name):
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
    command = [
        "java",
        *UTF8,
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    done = subprocess.run(
        command, cwd=_folder("tokenizer"), input=lines.encode(), capture_output=True
    )
    found = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(found) != len(captions):
        raise JavaError(f"the PTB tokenizer failed ({_last_line(done.stderr)})")
    return [[word for word in line.split() if word not in PUNCTUATION] for line in found]


def meteor(references, systems):
    """
    METEOR, 0..1: per system that of all N images, and a list of those of each image alone.
    references: per image a list of captions; systems: each N captions; a caption is a list of words

    METEOR takes 2 GB of memory and some seconds to load its paraphrases. Raises JavaError.
    """
    n = len(references)
    lines = [
        _meteor_line("SCORE", [" ".join(words) for words in (*(captions or [[]]), hypothesis)])
        for hypotheses in systems
        for captions, hypothesis in zip(references, hypotheses)
    ]
    with (
        _plain_path(_folder("meteor")) as folder,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [
                "java",
                *UTF8,
                "-Xmx2G",
                "-jar",
                f"{folder}/meteor-1.5.jar",
                "-",
                "-",
                "-stdio",
                "-l",
                "en",
                "-norm",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        writer = threading.Thread(target=_write, args=(process.stdin, lines), daemon=True)
        writer.start()  # concurrently, since the pipes' buffers cannot hold all lines
        try:
            matches = [  # per caption the statistics that METEOR sums over images
                process.stdout.readline().decode()
                for _ in tqdm(
                    lines, desc="METEOR", unit="caption", delay=2, leave=False, disable=None
                )
            ]
            writer.join()
            scores = []
            for i in range(len(systems)):
                _write(process.stdin, [_meteor_line("EVAL", matches[i * n : (i + 1) * n])])
                *each, total = [float(process.stdout.readline()) for _ in range(n + 1)]
                scores.append((total, each))
        except ValueError:  # no number: it has exited, or complains
            scores = None
        finally:
            process.kill()
            writer.join()
            with suppress(OSError):
                process.stdin.close()
        if scores is None:
            errors.seek(0)
            raise JavaError(f"METEOR failed ({_last_line(errors.read())}); it needs 2 GB of memory")
    return scores


def _meteor_line(command, texts):
    texts = [" ".join(text.replace("|||", "").split()) for text in texts]
    return (" ||| ".join([command, *texts]) + "\n").encode(errors="replace")


@contextmanager
def _plain_path(folder):
    """
    The folder, or a copy of it, under a path where METEOR finds its data: it takes the path of its
    program from a URL without decoding it, so that a space, % or é in it would be wrong.
    """
    if re.fullmatch(r"[\w./-]+", str(folder), re.ASCII):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        yield shutil.copytree(folder, Path(parent, "meteor"))


def _write(pipe, lines):
    with suppress(OSError):  # Java has exited, which the reader notices
        pipe.writelines(lines)
        pipe.flush()


def _last_line(text):
    """What a Java program said last, without the places in its code."""
    lines = [
        line
        for line in text.decode(errors="replace").strip().splitlines()
        if not line.startswith("\tat ")
    ]
    return lines[-1] if lines else "no message"
