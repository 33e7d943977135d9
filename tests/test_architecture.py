"""The rooms and floors of `labutils`: a module imports only from lower floors, and topics do not import one another."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "labutils"
TOPICS = (
    "generation",
    "quantization",
    "pruning",
    "distillation",
    "acceleration",
    "xla",
    "fpga",
    "distributed",
    "decoding",
    "serving",
    "speech",
    "applications",
)
# Three rooms: what a learner reads stands by itself, what it is tried on in `lab`, what teaches it in `course`.
TOPICS_OF_ALL = {"measurement", "capstone"}
LAB = {"paths", "language", "hosts", "layers", "training", "models", "data", "plots", "widgets"}
COURSE = {"course", "checks", "bench", "cli"}  # "course": the files of that folder itself
FLOORS = [
    {"paths", "language", "hosts", "measurement", "layers", "training"},
    set(TOPICS),
    {"models", "data", "capstone"},
    {"checks", "plots", "widgets", "course"},
    {"cli", "bench"},
]
# Rooms of one floor that may use each other. Topics do not, but for decoding.
NEIGHBOURS = {
    ("measurement", "paths"),
    ("layers", "paths"),
    ("training", "paths"),
    ("measurement", "layers"),  # what a model is, is read in one place: lab/layers/architecture.py
    ("decoding", "generation"),  # chapter 10 speeds up the verbs of chapter 01
    ("serving", "decoding"),  # drafts for several streams
    ("serving", "generation"),  # chapter 11 serves many with the decoder and the samplers of chapter 01
    ("applications", "generation"),
    ("applications", "decoding"),  # answers under a grammar
    ("models", "data"),
    ("capstone", "models"),  # chapter 13 builds on everything
    ("capstone", "data"),
    ("course", "checks"),
    ("course", "plots"),  # figures in an edition's language
    ("widgets", "plots"),
    ("cli", "bench"),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 320, 45
TABLES = {"lab/data/service_grammar.py"}  # data, not code
# The design's aims were 500 lines a topic and 5,000 in all; the checks' hints and references alone take 1,400 for four
# chapters. These bounds keep growth in sight: raise one only beside a chapter that needs it.
MAX_TOPIC_CODE_LINES, MAX_CODE_LINES = 1_540, 30_170
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(parts):
    """A folder of topics, `lab` or `course`: of a file's path below the package, or of a dotted name after `labutils`.

    >>> room_of(("course", "bench", "table")), room_of(("course", "build")), room_of(("lab", "paths", "DATA"))
    ('bench', 'course', 'paths')
    """
    inside = {"lab": LAB, "course": COURSE}.get(parts[0], ())
    return parts[1] if len(parts) > 1 and parts[1] in inside else parts[0]


def floor_of(name):
    return next((level for level, rooms in enumerate(FLOORS) if name in rooms), None)


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "labutils" and len(parts) > 1 and parts[1] not in {"__init__", "__version__"}:
                yield room_of(parts[1:])


def allowed(importer, imported):
    if importer == imported or (importer, imported) in NEIGHBOURS:
        return True
    return floor_of(imported) < floor_of(importer)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_keeps_to_its_floor(path):
    if path.stem in {"__init__", "__main__"} and path.parent in {PACKAGE, PACKAGE / "lab"}:
        return
    assert floor_of(room(path)) is not None, f"{room(path)} stands on no floor: add it to FLOORS"
    for imported in imported_rooms(path):
        assert allowed(room(path), imported), f"{room(path)} (floor {floor_of(room(path))}) imports {imported}"


def test_there_are_three_rooms():
    def inside(*folders):
        entries = PACKAGE.joinpath(*folders).iterdir()
        names = {path.stem for path in entries if path.is_dir() or path.suffix == ".py"}
        return names - {"__init__", "__main__", "__pycache__"}

    assert inside() == set(TOPICS) | TOPICS_OF_ALL | {"lab", "course"}
    assert inside("lab") == LAB | {"languages"}
    assert {path.name for path in (PACKAGE / "course").iterdir() if path.is_dir()} - {"__pycache__"} == COURSE - {
        "course"
    }
    assert set().union(*FLOORS) == set(TOPICS) | TOPICS_OF_ALL | LAB | COURSE


def test_the_rule_can_fail():
    assert not allowed("generation", "models")
    assert not allowed("measurement", "generation")
    assert not allowed("data", "models")
    assert allowed("cli", "measurement")


def test_a_new_topic_needs_its_name_only(monkeypatch):
    """What CONTRIBUTING promises; the demonstration chapter of the tests shows the other four lines at work."""
    assert floor_of("toy") is None
    monkeypatch.setitem(globals(), "FLOORS", [FLOORS[0], FLOORS[1] | {"toy"}, *FLOORS[2:]])
    assert all(allowed("toy", tool) for tool in ("measurement", "layers", "training", "paths"))
    assert all(allowed(user, "toy") for user in ("models", "capstone", "checks", "plots", "bench"))
    assert not any(allowed("toy", other) for other in (*TOPICS, "models", "checks", "cli"))


def test_contributing_shows_the_house_as_it_is():
    from house_map import BLOCK, PAGE, mermaid

    assert BLOCK.search(PAGE.read_text(encoding="utf-8"))[0] == mermaid(), "run python tests/house_map.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_short(path):
    source = path.read_text(encoding="utf-8")
    if path.relative_to(PACKAGE).as_posix() in TABLES:
        return
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            has_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant)
            start = first.end_lineno if has_docstring else node.lineno
            assert node.end_lineno - start <= MAX_FUNCTION_LINES, f"{node.name} is longer than a screen"


def lines_of_code(path):
    """Lines that are neither blank, comment nor docstring."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in docstrings)


def test_package_stays_readable():
    code = [path for path in MODULES if path.relative_to(PACKAGE).as_posix() not in TABLES]
    assert sum(map(lines_of_code, code)) <= MAX_CODE_LINES
    for topic in TOPICS:
        assert sum(lines_of_code(path) for path in code if room(path) == topic) <= MAX_TOPIC_CODE_LINES


def test_package_init_holds_a_docstring_and_the_version():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 2


@pytest.mark.parametrize(
    "path", [PACKAGE / "__main__.py", *sorted((PACKAGE / "course" / "cli").glob("*.py"))], ids=lambda p: p.stem
)
def test_command_line_starts_with_the_standard_library_only(path):
    import sys

    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                assert (
                    top in sys.stdlib_module_names
                    or name.startswith(("labutils.course.cli", "labutils.lab.paths"))
                    or (name == "labutils")
                ), f"{path.name} imports {name} before the environment stands"
