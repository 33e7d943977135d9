"""Files that appear whole or not at all."""

import pytest

from labutils.lab.paths import learner_dir, written_whole


def test_written_whole_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "made" / "curve.jsonl"
    for text in ("first", "second"):
        with written_whole(path) as new:
            new.write_text(text, encoding="utf-8")
            assert not path.exists() or path.read_text(encoding="utf-8") == "first"
        assert path.read_text(encoding="utf-8") == text
    assert [item.name for item in path.parent.iterdir()] == ["curve.jsonl"]


def test_written_whole_keeps_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "curve.jsonl"
    path.write_text("whole", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), written_whole(path) as new:
        new.write_text("ha", encoding="utf-8")
        _ = 1 / 0
    assert path.read_text(encoding="utf-8") == "whole" and [item.name for item in tmp_path.iterdir()] == [path.name]


def test_written_whole_needs_the_file_to_be_written(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "curve.jsonl"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_learner_dir_is_beside_labutils_by_default(monkeypatch):
    monkeypatch.delenv("LABUTILS_HOME", raising=False)
    assert learner_dir().name == "learner" and (learner_dir().parent / "labutils").is_dir()
