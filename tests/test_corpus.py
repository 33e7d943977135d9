"""The corpus: fixed held-out modules, no leak into training, a clear word where a Python has no sources."""

import pytest

from labutils.lab.data import corpus
from labutils.lab.data.corpus import Document


@pytest.fixture(scope="module")
def train_documents():
    return corpus.stdlib_documents("train")


def test_splits_are_disjoint_and_sized(train_documents):
    held_out = {d.name for d in corpus.held_out_documents()}
    assert held_out == {*corpus.VALIDATION_MODULES, *corpus.TEST_MODULES}
    assert len(held_out) == len(corpus.VALIDATION_MODULES) + len(corpus.TEST_MODULES)
    assert not held_out & {d.name for d in train_documents}
    assert sum(len(d.text) for d in train_documents) > 5_000_000
    assert 600_000 < sum(len(d.text) for d in corpus.stdlib_documents("test")) < 1_500_000


def test_training_text_repeats_no_held_out_passage(train_documents):
    for held_out in corpus.stdlib_documents("test"):
        middle = held_out.text[len(held_out.text) // 2 :][:600]
        assert not [d.name for d in train_documents if middle in d.text], held_out.name


def test_without_copies_keeps_what_shares_a_little():
    original = Document("original.py", "\n".join(f"statement_{i}()" for i in range(30)))
    copy = Document("vendored/original.py", "# vendored\n\n" + original.text.replace("\n", "\n\n"))
    quote = Document("quote.py", "\n".join(f"statement_{i}()" for i in range(7)))
    assert corpus.without_copies([copy, quote], [original]) == [quote]


def test_tests_are_told_apart():
    names = ("test/test_os.py", "json/tests/x.py", "idlelib/test_x.py", "unittest/mock.py", "os.py")
    assert [corpus.is_test_file(Document(name, "x")) for name in names] == [True, True, True, False, False]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, validation, test; got 'dev'"):
        corpus.stdlib_documents("dev")


def test_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ships its standard library's source"):
        corpus.stdlib_documents("test")


def test_undecodable_files_are_passed_over(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "windows.py").write_bytes(b"a = 1\r\nb = 2\r\n")
    assert corpus.read_source(tmp_path / "latin.py") is None
    assert corpus.read_source(tmp_path / "windows.py") == "a = 1\nb = 2\n"


def test_package_source_is_capped_and_leaves_out_our_own(monkeypatch, tmp_path):
    for package in ("big", "small", "labutils"):
        (tmp_path / package).mkdir()
        for i in range(4):
            (tmp_path / package / f"m{i}.py").write_text(f"{package}_{i} = '{'x' * 50}'\n", encoding="utf-8")
    monkeypatch.setattr(corpus, "PACKAGE_LIMIT_BYTES", 150)
    real = corpus.sysconfig.get_path
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path) if name == "purelib" else real(name))
    names = [d.name for d in corpus.package_documents()]
    assert len(names) == 4 and {name.split("/")[0] for name in names} == {"big", "small"}
