"""`rebadge`: one name, changed everywhere."""

from argparse import ArgumentParser

import pytest
from hand_ins import STEM, demo_course

from labutils.course.badge import check_slug, readme_badge, rebadge, repository
from labutils.course.build import learner_notebook, text_of
from labutils.course.cli import rebadge as command
from labutils.course.source import read_chapter

README = "# Course\n<!-- badges -->\nold\n<!-- /badges -->\ngit clone https://github.com/demo-owner/demo-course.git\n"


@pytest.fixture
def root(tmp_path):
    root = demo_course(tmp_path)
    (root / "README.md").write_text(README, encoding="utf-8")
    (root / "CITATION.cff").write_text('url: "https://github.com/demo-owner/demo-course"\n', encoding="utf-8")
    return root


def test_rebadge_leaves_no_old_name(root):
    changed = rebadge(root, "new-owner/new.course")
    assert repository(root) == "new-owner/new.course"
    assert len(changed) == 5
    for path in root.rglob("*"):
        if path.suffix in {".ipynb", ".md", ".cff", ".toml"}:
            text = path.read_text(encoding="utf-8")
            assert "demo-owner" not in text and "new-owner/new.course" in text, path
    assert "github.com/new-owner/new.course.git" in (root / "README.md").read_text(encoding="utf-8")


def test_rebadge_gives_what_a_build_would_give(root):
    rebadge(root, "new-owner/new-course")
    chapter = read_chapter(root / "notebooks" / "source" / f"{STEM}.py")
    stored = (root / "notebooks" / f"{STEM}.ipynb").read_text(encoding="utf-8")
    assert stored == text_of(learner_notebook(chapter, "new-owner/new-course"))


def test_rebadge_there_and_back_changes_nothing(root):
    rebadge(root, "demo-owner/demo-course")
    files = [path for path in root.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert rebadge(root, "demo-owner/demo-course") == []
    rebadge(root, "x/y")
    rebadge(root, "demo-owner/demo-course")
    assert {path: path.read_bytes() for path in files} == before


def test_rebadge_leaves_longer_names_alone(root):
    path = root / "CITATION.cff"
    other = "https://github.com/demo-owner/demo-course-2 https://github.com/my-demo-owner/demo-course\n"
    path.write_text(other, encoding="utf-8")
    rebadge(root, "x/y")
    assert path.read_text(encoding="utf-8") == other


def test_readme_badge_opens_the_first_chapter(root):
    rebadge(root, "x/y")
    text = (root / "README.md").read_text(encoding="utf-8")
    assert readme_badge("x/y", f"notebooks/{STEM}.ipynb") in text
    assert text.count("colab-badge.svg") == 1


@pytest.mark.parametrize("slug", ["", "owner", "owner/", "/name", "a/b/c", "a b/c", "https://github.com/a/b", "-a/b"])
def test_slug_is_owner_and_name(slug, root, capsys):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        check_slug(slug)
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--root", str(root), "--", slug])) == 2
    assert "OWNER/NAME" in capsys.readouterr().err


def test_command_says_what_it_wrote(root, capsys):
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["x/y", "--root", str(root)])) == 0
    assert "5 files now name x/y" in capsys.readouterr().out
