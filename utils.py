"""
What all scripts share: how they start and end, errors that a user sees, options, and atomic writes
of files. Imports no other module of this repository.
"""

import argparse
import ctypes
import io
import json
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from operator import ge, gt, le, lt
from pathlib import Path

AMP = {"bf16": "bfloat16", "fp16": "float16"}  # torch's names
MAX_LENGTH_PENALTY = 10  # beyond it only the length would count, and powers overflow
MAX_INT = 2**31 - 1  # of an option: larger numbers overflow in NumPy, torch or HDF5
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def printable(text):
    """The text on one line: control characters and halves of surrogate pairs become escapes."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def count(number, noun, plural=None):
    """As in "1 epoch", "2 epochs"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


class UserError(Exception):
    """A user's mistake: a line that names the file, the value and the next step; details: more."""

    def __init__(self, message, details=()):
        super().__init__("\n  ".join(map(printable, (message, *details))))

    def __str__(self):
        # What a line echoes may be of any length; the file and the next step are at its ends.
        lines = self.args[0].split("\n")
        return "\n".join(x if len(x) <= 600 else f"{x[:300]} … {x[-297:]}" for x in lines)


def run_script(main):
    """Call a script's main(); a mistake of the user ends it with one line and exit code 2."""
    set_up_process()
    code = 2
    try:
        main()
        return
    except BrokenPipeError:  # as in `| head`: Python's flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        message, code = str(error) or "interrupted", getattr(error, "code", 130)
    except (UserError, OSError) as error:  # OSError: a full disk, for example
        message = str(error if isinstance(error, UserError) else UserError(str(error)))
    except RuntimeError as error:
        import torch

        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        message = "the memory is full; pass a smaller --batch_size (train.py: or a larger "
        message += "--accumulate, which takes the same steps in parts)"
    with suppress(OSError):  # the terminal may be closed
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def timed(what, say):
    """Say when a long phase begins and how long it took, also where no progress bar is shown."""
    start = time.monotonic()
    say(f"{what} ...")
    yield
    say(f"{what} took {time.monotonic() - start:.0f} s")


def set_up_process():
    """
    The settings of a script's whole process. Importing a module of this repository changes none.
    """
    for stream in (sys.stdout, sys.stderr):
        # Any text can be printed: as UTF-8 to files and pipes, with escapes to a limited terminal.
        if isinstance(stream, io.TextIOWrapper):
            encoding = None if stream.isatty() else "utf-8"
            options = {"errors": "backslashreplace", "line_buffering": True}  # for log files
            stream.reconfigure(encoding=encoding, **options)
    if "torch" in sys.modules:  # else nothing will be computed, and importing it takes a second
        import torch

        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
        # Numbers below 1e-38 become 0: sharp attention is full of them, and on a CPU they take 10
        # times as long as other numbers.
        torch.set_flush_denormal(True)
        # glibc gives large freed blocks back to the system, which clears each page again when it is
        # next touched: an eighth to a quarter of a training step on a CPU.
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(_M_TRIM_THRESHOLD, -1)
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_ARENA_MAX, 1)  # else each thread keeps what it has freed for itself
    from PIL import PngImagePlugin

    # Read PNGs with large texts or colour profiles too, which Pillow refuses by default.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    # Pillow warns about unusual but readable files. A letter that no font has is reported once, by
    # visualization.figures.find_font.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="Glyph .* missing from")


# Options


class Number:
    """An argparse type: an int or a float within bounds; `above` and `below` are exclusive."""

    def __init__(self, kind, minimum=None, maximum=None, above=None, below=None):
        self.kind = kind
        self.__name__ = kind.__name__  # argparse names it in "invalid int value"
        if kind is int and maximum is None:
            maximum = MAX_INT
        bounds = {"at least": minimum, "above": above, "at most": maximum, "below": below}
        self.bounds = {words: bound for words, bound in bounds.items() if bound is not None}

    def __call__(self, text):
        value = self.kind(text)
        holds = {"at least": ge, "above": gt, "at most": le, "below": lt}  # false for NaN
        if not all(holds[words](value, bound) for words, bound in self.bounds.items()):
            allowed = " and ".join(f"{words} {bound}" for words, bound in self.bounds.items())
            raise argparse.ArgumentTypeError(f"is {value}, it must be {allowed}")
        return value


positive_int = Number(int, minimum=1)
non_negative_int = Number(int, minimum=0)
# What nobody needs is refused before it fills the memory: words, captions or beams; batches, sizes
small_int = Number(int, minimum=1, maximum=1000)
large_int = Number(int, minimum=1, maximum=100_000)
process_count = Number(int, minimum=0, maximum=1000)
non_negative_float = Number(float, minimum=0)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of descriptions, and show the default of each option that has one."""

    def _get_help_string(self, action):
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """
    An ArgumentParser that raises its errors as one-line UserErrors. Options cannot be abbreviated:
    `--lr` would silently mean `--lr_decay`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        message = re.sub(r"^argument (?:-\w+/)?(\S+): ", r"\1: ", message)
        message = re.sub(r"^(\S+): is ", r"\1 is ", message)  # the error of a Number
        raise UserError(f"{message}; --help lists the options")

    def options(self):
        """Every option's default by name."""
        return {action.dest: action.default for action in self._actions if action.dest != "help"}

    def parse_given(self, argv):
        """The options given in argv, by name, without the defaults of the others."""
        missing = object()
        args = argparse.Namespace(**dict.fromkeys(self.options(), missing))
        self.parse_args(argv, args)
        return {name: value for name, value in vars(args).items() if value is not missing}

    def set_options_from(self, source, values):
        """
        Make these values the defaults, {option: value}; unknown names are ignored. Raises UserError
        that names the file `source` for a value that its option cannot have.
        """
        for action in self._actions:
            if action.dest in values:
                value = values[action.dest]
                if not _can_have(action, value):
                    shown = repr(value)[:200]
                    raise UserError(f"{source} is damaged: its option {action.dest} is {shown}")
                self.set_defaults(**{action.dest: value})


def _can_have(action, value):
    if value is None or action.choices:
        return value in (None, *(action.choices or ()))
    if isinstance(action.type, Number):
        with suppress(ValueError, OverflowError, argparse.ArgumentTypeError):
            return isinstance(value, int | float) and action.type(value) == value
        return False
    return isinstance(value, {0: bool, "+": list}.get(action.nargs, str))


def add_device_options(parser):
    """--device and --amp, which modeling/devices.py takes, and --plain."""
    add = parser.add_argument
    add("--device", help="cuda, cuda:1, cpu, mps; if not given, a GPU of CUDA, else the CPU")
    add("--amp", choices=AMP, help="multiply matrices in half precision; float32 if not given")
    plain = "run the decoder's equations as models.py states them, which is slower"
    add("--plain", action="store_true", help=plain)


def add_search_options(parser, no_unk=False, no_repeat_words=False):
    """The options of the search for captions; no_unk, no_repeat_words: defaults of these."""
    add = parser.add_argument_group("search").add_argument
    add("--max_len", type=small_int, default=50, help="longest caption, in words")
    power = Number(float, minimum=0, maximum=MAX_LENGTH_PENALTY)
    text = "rank captions by their score over length to this power; 1: mean per word"
    add("--length_penalty", type=power, default=0.0, help=text)
    add("--no_unk", action="store_true", default=no_unk, help="never generate <unk>")
    other = {"action": "store_false", "default": argparse.SUPPRESS}
    text = "generate <unk> where it is the most probable, as in the tutorial"
    add("--unk", dest="no_unk", **other, help=text)
    text = "never generate a content word twice, if the model's words are English"
    add("--no_repeat_words", action="store_true", default=no_repeat_words, help=text)
    text = "generate words again where they are the most probable, as in the tutorial"
    add("--repeat_words", dest="no_repeat_words", **other, help=text)
    text = "never repeat N words in the same order; 0: allowed"
    add("--no_repeat_ngram", type=non_negative_int, default=0, metavar="N", help=text)
    text = "hard: use the most attended location alone; for models trained with hard attention"
    add("--attention", choices=("soft", "hard"), default="soft", help=text)
    text = "sample captions at random, the same ones with the same --seed, instead of searching"
    add("--sample", action="store_true", help=text)
    text = "--sample: above 1 more varied, below 1 safer"
    add("--temperature", type=Number(float, above=0, maximum=100), default=1.0, help=text)
    text = "--sample: only from the likeliest words that together have this probability"
    add("--top_p", type=Number(float, above=0, maximum=1), default=1.0, help=text)


def search_options(args):
    """The options as fields of a `modeling.beam_search.Search`; UserError if they conflict."""
    hard = args.attention == "hard"
    if args.sample and (args.length_penalty or hard):
        raise UserError("--length_penalty and --attention hard are not for --sample; leave one out")
    if not args.sample and (args.temperature, args.top_p) != (1, 1):
        raise UserError("--temperature and --top_p are for --sample; add it or leave them out")
    names = "max_len length_penalty no_unk no_repeat_words no_repeat_ngram sample temperature top_p"
    return {"hard_attention": hard} | {name: getattr(args, name) for name in names.split()}


# Files


@contextmanager
def atomic_write(path):
    """
    `with atomic_write(path) as temporary:` write to `temporary`, a name in the same folder, whose
    file then replaces `path`; after an error it is removed, and `path` is as it was. What a killed
    process leaves behind is overwritten by the next. Two processes must not write the same file.

    Raises UserError if `path` is a folder, a device or the like.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file; pass another name")
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power failure could leave an empty file in its place
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def check_is_file(path):
    """UserError if `path` is a folder, a device or a pipe, which might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        reason = "Is a directory" if os.path.isdir(path) else "it is not a file"
        raise UserError(f"{path} cannot be read: {reason}")


def read_text(path, next_step=""):
    """
    The text of a UTF-8 file, with or without a byte order mark. UserError for a file that is not
    UTF-8 or is missing; for a missing one, the message ends with the `next_step`.
    """
    check_is_file(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} not found" + f"; {next_step}" * bool(next_step)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None


def read_json(path, next_step=""):
    """The object in a JSON file; UserError as in `read_text`, or if the file is broken."""
    text = read_text(path, next_step)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken_json(path, error) from None


def broken_json(path, error, line=None):
    """UserError for what json.loads raises: bad syntax, deep nesting, a number of 5000 digits."""
    line = line or getattr(error, "lineno", None)
    place = f"{path}, line {line}" if line else path
    deep = isinstance(error, RecursionError)
    reason = "nested too deeply" if deep else getattr(error, "msg", error)
    return UserError(f"{place}: broken JSON: {reason}")


def write_json(path, content):
    with atomic_write(path) as temporary:  # json.dump would use the slow encoder
        Path(temporary).write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def exclusive_lock(path, busy, timeout):
    """
    Hold the lock file `path` while the block runs; UserError with the message `busy` if another
    process still holds it after `timeout` seconds. The system releases a killed process's lock.
    """
    from filelock import FileLock, Timeout  # only here: most commands lock nothing

    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise UserError(busy) from None
    except (NotImplementedError, OSError) as error:  # some network disks have no locks
        raise UserError(f"{path} cannot be locked ({error}); pass a folder elsewhere") from None
    try:
        yield
    finally:
        with suppress(OSError):  # before the release, since another process may lock it afterwards
            os.remove(path)
        lock.release()
