"""Files read and written with care: the errors that a user sees, JSON, and whole files or none."""

import argparse
import json
import os
from contextlib import contextmanager

RESERVED = ("<pad>", "<unk>", "<start>", "<end>")


class UserError(Exception):
    """A mistake of the user's: one line that names the file, the value and the next step."""


@contextmanager
def whole(path):
    """
    `with whole(path) as temporary:` write to `temporary`; the file then stands at `path` whole,
    even if the power fails, or after an error not at all.
    """
    temporary = f"{path}.tmp"  # same folder, since os.replace stays within a file system
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def sync_folder(folder):
    """That a file has moved is a fact of its folder, which has to reach the disk as well."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they stand, and the default of each option that has one."""

    def _get_help_string(self, action):
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """
    Its errors are a UserError like any other: one line, without the list of all options. These are
    not abbreviated: --lr would be --lr_decay.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; --help lists the options")

    def parse_args(self, *args, **kwargs):
        """argparse does not look at choices of defaults, which may come from anybody's file."""
        options = super().parse_args(*args, **kwargs)
        for action in self._actions:
            values = getattr(options, action.dest, None)
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if action.choices and value is not None and value not in action.choices:
                    self.error(f"--{action.dest} is {ascii(value)[:50]}, not one of "
                               f"{', '.join(action.choices)}")
        return options


def read_text(path, next_step=""):
    """
    The text of a UTF-8 file, with or without a byte order mark.

    Raises UserError if it is none; `next_step` says what to do about a missing file.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path} not found" + f"; {next_step}" * bool(next_step)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except (OSError, ValueError) as error:  # a folder, no permission; a name with a NUL
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


def check_word_map(word_map, path):
    """
    UserError unless the word map of this file is one: words -> ids from 0 up, each once, with
    <pad> 0 and the other special words.
    """
    if not isinstance(word_map, dict) or not all(type(i) is int for i in word_map.values()):
        wrong = "it is no object of words and whole numbers"
    elif missing := [word for word in RESERVED if word not in word_map]:
        wrong = f"it lacks {', '.join(missing)}"
    elif word_map["<pad>"] != 0:
        wrong = f"<pad> is {word_map['<pad>']}, not 0"
    elif gaps := set(range(len(word_map))).symmetric_difference(word_map.values()):
        wrong = (f"its {len(word_map)} words do not have the ids 0 to {len(word_map) - 1} once "
                 f"each, see {min(gaps)}")
    else:
        return word_map
    raise UserError(f"{path} is no word map: {wrong}; pass the WORDMAP file of the training data")


def read_word_map(path, next_step=""):
    """Word -> id from a WORDMAP file; UserError as `read_json` and `check_word_map`."""
    return check_word_map(read_json(path, next_step), path)


def write_json(path, content):
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content))  # json.dump would take the slow encoder
