"""Files read and written with care: the errors that a user sees, JSON, and whole files or none."""

import json
import os
from contextlib import contextmanager


class UserError(Exception):
    """A mistake of the user's: one line that names the file, the value and the next step."""


@contextmanager
def whole(path):
    """
    `with whole(path) as temporary:` write to `temporary`; the file then stands at `path` whole,
    even if the power fails, or after an error not at all.
    """
    temporary = f"{path}.{os.getpid()}.tmp"  # same folder, since os.replace stays in a file system
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


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
    except OSError as error:  # a folder, no permission
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path, next_step=""):
    """The object in a JSON file; UserError if the file is missing or broken."""
    text = read_text(path, next_step)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from None


def write_json(path, content):
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content))  # json.dump would take the slow encoder
