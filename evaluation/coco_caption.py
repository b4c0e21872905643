"""The Java programs of pycocoevalcap: the PTB tokenizer, METEOR 1.5 and SPICE."""

import functools
import re
import shutil
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
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
# METEOR 1.5's parameters for English; the weights are for exact, stem, synonym, paraphrase matches.
MATCH_WEIGHTS, ALPHA, BETA, GAMMA, DELTA = np.array([1.0, 0.6, 0.8, 0.6]), 0.85, 0.2, 0.6, 0.75
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


def meteor_sums(references, hypotheses):
    """
    The statistics that METEOR sums over images, for the best reference of each: float64 (N, 23).
    references: per image a list of captions, hypotheses: per image one; lists of words

    METEOR takes 2 GB of memory and some seconds to load its paraphrases. Raises JavaError.
    """
    lines = []
    for captions, hypothesis in zip(references, hypotheses):
        texts = [" ".join(" ".join(words).split()) for words in (*(captions or [[]]), hypothesis)]
        lines.append(" ||| ".join(["SCORE", *(text.replace("|||", "") for text in texts)]) + "\n")
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
            answers = [
                process.stdout.readline().split()
                for _ in tqdm(
                    lines, desc="METEOR", unit="caption", delay=2, leave=False, disable=None
                )
            ]
        finally:
            process.kill()
            writer.join()
        if any(len(answer) != 23 for answer in answers):
            errors.seek(0)
            raise JavaError(f"METEOR failed ({_last_line(errors.read())}); it needs 2 GB of memory")
    sums = np.array(answers, dtype=np.float64).reshape(-1, 23)
    # METEOR counts 0 chunks for a caption that is matched completely in one chunk.
    complete = (sums[:, [0, 1]] == sums[:, [21, 22]]).all(1) & (sums[:, 20] == 1)
    sums[complete, 20] = 0
    return sums


def spice(references, hypotheses):
    """
    SPICE's F-score of each image, 0..1, by pycocoevalcap. Arguments as of `meteor_sums`.

    Raises JavaError, also where the models of its parser are missing, which the package does not
    bring.
    """
    from pycocoevalcap.spice.spice import Spice

    if not (_folder("spice") / "lib" / "stanford-corenlp-3.6.0-models.jar").exists():
        raise JavaError(
            "its parser's models are missing; download them once with python -m "
            "pycocoevalcap.spice.get_stanford_models"
        )
    texts = [
        {i: [" ".join(words) for words in captions] for i, captions in enumerate(group)}
        for group in (references, [[words] for words in hypotheses])
    ]
    try:
        _, scores = Spice().compute_score(*texts)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise JavaError(f"SPICE failed ({error}); it needs 8 GB of memory") from None
    return np.nan_to_num([image["All"]["f"] for image in scores])


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
    with suppress(OSError), pipe:  # Java has exited, which the reader notices
        pipe.writelines(line.encode() for line in lines)


def _last_line(text):
    """What a Java program said last, without the places in its code."""
    lines = [
        line
        for line in text.decode(errors="replace").strip().splitlines()
        if not line.startswith("\tat ")
    ]
    return lines[-1] if lines else "no message"


def meteor_from_sums(sums):
    """
    METEOR, 0..1, from summed `meteor_sums` (..., 23): lengths and function words of caption and
    reference (4), for each kind of match the matched content and function words of both (4 x 4),
    chunks, and matched words of both (2). Equals the score of the program itself for such a sum.
    """
    lengths, function = sums[..., 0:2], sums[..., 2:4]
    matched = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    content_matched, function_matched = (
        np.einsum("...sk,s->...k", matched[..., part], MATCH_WEIGHTS) for part in ([0, 1], [2, 3])
    )
    weighted = DELTA * content_matched + (1 - DELTA) * function_matched
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where nothing matches
        precision, recall = np.moveaxis(
            weighted / (DELTA * (lengths - function) + (1 - DELTA) * function), -1, 0
        )
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        score = mean * (1 - GAMMA * (sums[..., 20] / sums[..., 21:23].mean(-1)) ** BETA)
    return np.nan_to_num(score)
