"""utils.py: read errors are one line, and files are written completely or not at all."""

import pytest

from utils import UserError, read_json, write_json


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.json not found"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text('{"a":\n]}')
    with pytest.raises(UserError, match=r"x\.json, line 2: broken JSON"):
        read_json(tmp_path / "x.json")
