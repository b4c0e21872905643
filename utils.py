"""
What all scripts share: how they start and end, errors that a user sees, options, and files that are
written whole. Imports no other module of this repository.
"""

import argparse
import ctypes
import errno
import io
import itertools
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AMP = {"bf16": "bfloat16", "fp16": "float16"}  # torch's names
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_LENGTH_PENALTY = 10  # beyond it only the length would count, and powers overflow
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
MAX_INT = 2**31 - 1  # of an option: larger numbers overflow in NumPy, torch or HDF5


def printable(text):
    """
    The text on one line: control characters, which a terminal would obey, and halves of surrogate
    pairs, which UTF-8 lacks, are written as escapes.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def count(number, noun, plural=None):
    """As in "1 epoch", "2 epochs"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


class UserError(Exception):
    """
    A user's mistake: one line that names the file, the value and the next step. details: further
    lines, such as a reason for each of several files
    """

    def __init__(self, message, details=()):
        super().__init__("\n  ".join(map(printable, (message, *details))))


def run_script(main):
    """Call a script's main(); a mistake of the user ends it with one line and exit code 2."""
    set_up_process()
    try:
        main()
    except BrokenPipeError:  # as in `| head`: Python's flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        import torch

        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        print(
            f"{os.path.basename(sys.argv[0])}: the memory is full; pass a smaller --batch_size "
            f"(train.py: or a larger --accumulate, which takes the same steps in parts)",
            file=sys.stderr,
        )
        sys.exit(2)
    except (UserError, OSError, KeyboardInterrupt) as error:  # OSError: a full disk, for example
        interrupted = isinstance(error, KeyboardInterrupt)
        message = str(error) if isinstance(error, UserError) else printable(str(error))
        message = message or "interrupted"
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(getattr(error, "code", 130) if interrupted else 2)


def set_up_process():
    """
    The settings of a script that hold for its whole process: its output, torch, memory, Pillow and
    warnings. Nothing else in this repository changes them, so that a program which imports its
    modules keeps its own.
    """
    for name in ("stdout", "stderr"):
        _prepare_stream(name)
    if "torch" in sys.modules:  # else nothing will be computed, and to import it takes a second
        import torch

        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
        # Numbers below 1e-38 become 0: sharp attention is full of them, and on a CPU they take 10
        # times as long as other numbers.
        torch.set_flush_denormal(True)
        _keep_freed_memory()
    from PIL import PngImagePlugin

    # Text and colour profiles of a PNG need not be small: the pixels are what counts.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    # Pillow warns about unusual but readable files. A letter that no font has is said once, by
    # visualization.figures.find_fonts.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="Glyph .* missing from")


def _prepare_stream(name):
    """
    Let sys.stdout or sys.stderr take any text: a file or a pipe gets UTF-8 wherever it is written;
    a terminal gets escapes for what it cannot show; what is written to a closed one, as by >&-, is
    dropped.
    """
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w"))
    elif isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


def _keep_freed_memory():
    """
    Ask the C library, where it is glibc, to keep memory that was freed for what is allocated next.
    By default it gives large blocks back to the system, which clears each page again when it is
    touched: that was found to take an eighth to a quarter of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


# Options


class Number:
    """
    An argparse type: an int or a float within bounds. NaN is rejected.

    least, most: inclusive bounds; above, below: exclusive ones
    """

    def __init__(self, kind, least=None, most=None, above=None, below=None):
        self.kind, self.__name__ = kind, kind.__name__  # argparse names it in "invalid int value"
        self.bounds = [
            (text, bound, is_met)
            for text, bound, is_met in (
                ("at least", least, lambda value: value >= least),
                ("above", above, lambda value: value > above),
                ("at most", most, lambda value: value <= most),
                ("below", below, lambda value: value < below),
            )
            if bound is not None
        ]

    def __call__(self, text):
        return self.check(self.kind(text))

    def check(self, value):
        """The value; argparse.ArgumentTypeError if it is out of bounds."""
        if self.kind is int and abs(value) > MAX_INT:
            raise argparse.ArgumentTypeError(f"is {value}, it must be at most {MAX_INT}")
        if not all(is_met(value) for _, _, is_met in self.bounds):
            allowed = " and ".join(f"{text} {bound}" for text, bound, _ in self.bounds)
            raise argparse.ArgumentTypeError(f"is {value}, it must be {allowed}")
        return value


positive_int = Number(int, least=1)
non_negative_int = Number(int, least=0)
non_negative_float = Number(float, least=0)


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
        """The options that argv has, by name, without defaults for the others."""
        missing = object()
        args = argparse.Namespace(**dict.fromkeys(self.options(), missing))
        self.parse_args(argv, args)
        return {name: value for name, value in vars(args).items() if value is not missing}

    def set_options_from(self, source, values):
        """
        Take these values, by option name, as defaults; unknown names are ignored. Raises UserError,
        which names the file `source`, for a value that is not of its option's type or range.
        """
        known = {action.dest: action for action in self._actions if action.dest in values}
        for name, action in known.items():
            try:
                _check_option(action, values[name])
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{source} is damaged: its option {name} {error}") from None
        self.set_defaults(**{name: values[name] for name in known})


def _check_option(action, value):
    """argparse.ArgumentTypeError unless this value, which was not parsed, suits the option"""
    if value is not None and action.nargs == "+":
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise argparse.ArgumentTypeError(f"is {ascii(value)[:50]}")
        return
    kinds = str if action.nargs != 0 else bool  # flags take no argument
    if isinstance(action.type, Number):
        kinds = (int, float) if action.type.kind is float else int
    valid = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
    if value is None and action.default is None:
        return
    if not valid or action.choices and value not in action.choices:
        raise argparse.ArgumentTypeError(f"is {ascii(value)[:50]}")
    if isinstance(action.type, Number):
        action.type.check(value)


def add_device_options(parser):
    """
    --device and --amp, which `find_device` and `autocast` of modeling/devices.py take, and --plain
    """
    parser.add_argument(
        "--device",
        help="cuda, cuda:1, cpu, mps; if not given, CUDA's GPU where there is one, else the CPU",
    )
    parser.add_argument(
        "--amp", choices=AMP, help="multiply matrices in half precision; float32 if not given"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="run the decoder's equations as models.py states them, which is slower",
    )


def add_search_options(parser, no_unk=False):
    """
    The options of the search for captions, see `search_options`; no_unk: the default of --no_unk
    """
    add = parser.add_argument_group("search").add_argument
    add("--max_len", type=positive_int, default=50, help="longest caption, in words")
    add(
        "--length_penalty",
        type=Number(float, least=0, most=MAX_LENGTH_PENALTY),
        default=0.0,
        help="rank captions by their score over length to this power; 1: mean per word",
    )
    add("--no_unk", action="store_true", default=no_unk, help="never say <unk>")
    add(
        "--no_repeat_ngram",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="say no N words twice in the same order; 0: allowed",
    )
    add(
        "--sample",
        action="store_true",
        help="sample captions at random, the same ones with the same --seed, instead of searching "
        "for the most probable one",
    )
    add(
        "--temperature",
        type=Number(float, above=0, most=100),
        default=1.0,
        help="--sample: above 1 more varied, below 1 safer",
    )
    add(
        "--top_p",
        type=Number(float, above=0, most=1),
        default=1.0,
        help="--sample: only from the likeliest words that together have this probability",
    )
    add(
        "--unk",
        dest="no_unk",
        action="store_false",
        default=argparse.SUPPRESS,
        help="say <unk> where no known word is as likely, as in the tutorial",
    )
    add(
        "--attention",
        choices=("soft", "hard"),
        default="soft",
        help="hard: look at the most attended location alone; for models that were trained with "
        "--attention hard",
    )


def search_options(args):
    """
    The fields of a `modeling.beam_search.Search` that the options of `add_search_options` set;
    UserError if they contradict each other.
    """
    hard = args.attention == "hard"
    if args.sample and (args.length_penalty or hard):
        raise UserError(
            "--length_penalty and --attention hard are for the search, not for --sample; leave one "
            "out"
        )
    if not args.sample and (args.temperature, args.top_p) != (1, 1):
        raise UserError("--temperature and --top_p are for --sample; add it or leave them out")
    names = ("max_len", "length_penalty", "no_unk", "no_repeat_ngram")
    names += ("sample", "temperature", "top_p")
    return {"hard_attention": hard} | {name: getattr(args, name) for name in names}


# Files


@contextmanager
def atomic_write(path):
    """
    `with atomic_write(path) as temporary:` write to `temporary`. The complete file then replaces
    `path`, safe even after a power failure; if an error is raised, `path` is left as it was.

    Raises UserError if `path` is a folder, a device or the like.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file; pass another name")
    with _temporary_file(path) as temporary:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")


@contextmanager
def _temporary_file(path):
    """
    A context with the name of an empty file in the folder of `path` (os.replace stays within a file
    system), which is removed after an error. No other process has it: it is locked where the system
    has such locks. One that a killed process left behind is used again.
    """
    folder, name = os.path.split(path)
    if fcntl is None:
        temporary, file = os.path.join(folder, f".{os.urandom(8).hex()}.tmp"), None
    else:
        # The name is cut off, since file systems limit its length.
        start = os.path.join(folder, "." + os.fsdecode(os.fsencode(name)[:200]))
        for i in itertools.count():
            temporary = f"{start}.{i}.unfinished"
            if file := _lock(temporary):
                break
    try:
        yield temporary
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    finally:  # once it has been moved, another process may have a file of this name
        if file:
            file.close()


def _lock(path):
    """The file, open and empty, if no other process has locked it, else None"""
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(file.fileno())):  # not just moved to its place
            file.truncate(0)
            return file
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    except OSError as error:  # a disk without locks
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return file
        raise
    file.close()
    return None


def sync_folder(folder):
    """Flush a folder to disk: a renamed file is safe only once its folder is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_is_file(path):
    """UserError if `path` is a folder, a device or a pipe, which might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        reason = "Is a directory" if os.path.isdir(path) else "it is not a file"
        raise UserError(f"{path} cannot be read: {reason}")


def read_text(path, next_step=""):
    """
    The text of a UTF-8 file, with or without a byte order mark.

    Raises UserError if it cannot be read; `next_step` says what to do about a missing file.
    """
    check_is_file(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path} not found" + f"; {next_step}" * bool(next_step)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}") from None


def read_json(path, next_step=""):
    """The object in a JSON file; UserError if the file is missing or broken."""
    text = read_text(path, next_step)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken_json(path, error) from None


def broken_json(path, error, line=None):
    """UserError for what json.loads raises: bad syntax, too deep, a number of 5000 digits."""
    deep, line = isinstance(error, RecursionError), line or getattr(error, "lineno", None)
    reason = "nested too deeply" if deep else getattr(error, "msg", error)
    return UserError(f"{path}" + f", line {line}" * bool(line) + f": broken JSON: {reason}")


def write_json(path, content):
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content))  # json.dump would use the slow encoder


@contextmanager
def exclusive_lock(path, busy, timeout=0.5):
    """
    Hold the lock file `path` while the block runs; the system releases it if the process dies.
    Raises UserError with the message `busy` if another process still holds it after `timeout`
    seconds.
    """
    from filelock import FileLock, Timeout  # only here: most commands lock nothing

    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)  # workers of a killed run hold it a moment longer
    except Timeout:
        raise UserError(busy) from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) not in (
            None,
            errno.ENOLCK,
            errno.ENOSYS,
            errno.EOPNOTSUPP,
        ):
            raise
        raise UserError(
            f"{path} cannot be locked, as on some network disks ({error}); pass a "
            f"folder on another disk"
        ) from None
    try:
        yield
    finally:
        if os.name == "posix":  # before the release: afterwards it may belong to another process
            with suppress(FileNotFoundError):
                os.remove(path)
        lock.release()
        if os.name != "posix":  # Windows does not remove an open file
            with suppress(OSError):
                os.remove(path)
