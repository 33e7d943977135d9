"""A real JupyterLab in a headless Chromium: chapter 00's first hour, a Chinese hint, each widget of 01 to 03, figures.

Set LABUTILS_CHROMIUM to a browser that is not on PATH. Screenshots go to ``artifacts/``.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest
from hand_ins import cell_of

from labutils.course.handout import handout

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ROOT / "artifacts"
STEM = "00_start_here"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = int(os.environ.get("LABUTILS_WAIT_S", "300")) * 1000  # generous: a busy machine is slow
SETTINGS = {  # all cells in the page, and no question about news
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def browser_path():
    names = [os.environ.get("LABUTILS_CHROMIUM", ""), *BROWSERS]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A class's kit in a running JupyterLab: its folder and its address."""
    folder = tmp_path_factory.mktemp("browser")
    root = folder / "kit"
    handout(ROOT, root, only="0")
    for name, content in SETTINGS.items():
        path = folder / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            server_command(root, folder, port),
            cwd=root,
            env=server_environment(root, folder),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"{address}/api/status", server, folder / "server.log")
        yield root, address
    finally:
        server.terminate()
        server.wait(60)


def server_command(root, folder, port):
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1"]
    options += [
        f"--ServerApp.root_dir={root}",
        "--IdentityProvider.token=",
        f"--LabApp.user_settings_dir={folder}/settings",
    ]
    return [sys.executable, "-m", "jupyter", "lab", *options]


def server_environment(root, folder):
    private = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    private["IPYTHONDIR"] = str(folder / "ipython")
    return {**os.environ, **private, "PYTHONPATH": str(root), "LABUTILS_HOME": str(folder / "learner")}


def wait_for(url, server, log):
    end = time.monotonic() + 2 * WAIT_MS / 1000
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text(encoding="utf-8", errors="replace")
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return reply.status
        except OSError:
            time.sleep(1)
    raise AssertionError(f"JupyterLab did not start: {log.read_text(encoding='utf-8', errors='replace')}")


@pytest.fixture
def page(lab):
    """A page of the browser; afterwards: no error in its console, no request beyond this machine."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if browser_path() is None:
        pytest.skip("no Chromium on PATH; on Debian: apt-get install chromium")
    errors, urls = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.on("websocket", lambda socket: urls.append(socket.url))
        yield page
        shot(page, page.locator("body"), "browser-last.png")
        browser.close()
    assert errors == []
    assert any(url.startswith("ws:") for url in urls) and any("/api/contents/" in url for url in urls)
    assert [url for url in urls if is_beyond(url)] == []


def is_beyond(url):
    """Whether a request left this machine; what a page makes for itself (data, blob) asks nobody."""
    parts = urlparse(url)
    return parts.scheme not in {"data", "blob"} and parts.hostname not in {"127.0.0.1", "localhost"}


def test_is_beyond():
    assert is_beyond("https://example.org/x.js") and is_beyond("wss://example.org")
    assert not is_beyond("http://127.0.0.1:8888/lab") and not is_beyond("blob:http://127.0.0.1/1")


def cell(page, first_line):
    return page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=first_line)).first


def answer(page, name, *lines):
    """Type an answer in place of an exercise's cell, run it and its check by keyboard."""
    cell(page, f"# EXERCISE {name}").locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.press("Delete")
    for line in (f"# EXERCISE {name}", *lines):  # the editor indents after a colon and closes brackets
        page.keyboard.type(line)
        page.keyboard.press("Enter")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")


def open_notebook(page, address, path):
    page.goto(f"{address}/lab/tree/{path}?reset")  # nothing that another test has left open
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()  # before, JupyterLab asks for a kernel


def test_a_learner_s_first_hour(lab, page):
    root, address = lab
    open_notebook(page, address, f"notebooks/{STEM}.ipynb")
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    progress = cell(page, "progress()").locator(".jp-OutputArea")
    progress.get_by_text("0 of 7 exercises passed").first.wait_for()  # the blanks have stopped nothing
    check = cell(page, "# CHECK tokens_per_second").locator(".jp-OutputArea")
    assert "still blank" in check.inner_text()
    see_the_plot(page)
    move_the_slider(page)
    answer_wrongly_then_rightly(page, check)
    progress.get_by_text("1 of 7 exercises passed").wait_for()
    bar = progress.locator(".jupyter-widgets .progress-bar")
    bar.wait_for()
    shot(page, progress, "browser-progress.png")
    with page.expect_response(lambda reply: reply.request.method == "PUT" and "/api/contents/" in reply.url) as saved:
        page.keyboard.press("ControlOrMeta+s")
    assert saved.value.ok
    stored = json.loads((root / "notebooks" / f"{STEM}.ipynb").read_text(encoding="utf-8"))
    assert "statistics.median(whole)" in "".join(cell_of(stored, "EXERCISE", "tokens_per_second")["source"])


def test_a_chinese_hint(lab, page):
    """Chapter 02 in Chinese: its text, a wrong answer with its hint, the right one."""
    open_notebook(page, lab[1], "notebooks/zh/02_quantization_formulas.ipynb")
    page.locator(".jp-MarkdownCell", has_text="练习 2.1：affine_codes").first.wait_for()
    for first_line in ("# SETUP", "import math"):
        cell(page, first_line).locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
    check = cell(page, "# CHECK affine_codes").locator(".jp-OutputArea")
    signature = "def affine_codes(x, scale, zero_point, qmin, qmax):"
    for operation, words in (("*", "你乘了缩放因子"), ("/", "✓ 2.1 affine_codes")):
        codes = f"codes = torch.round(x {operation} scale) + zero_point"
        answer(page, "affine_codes", signature, codes, "return codes.clamp(qmin, qmax).to(torch.int32)")
        check.get_by_text(words).wait_for()
        shot(page, check, f"browser-zh-{'wrong' if operation == '*' else 'right'}.png")
        assert ("应为" in check.inner_text()) == (operation == "*") and "Traceback" not in check.inner_text()


RECORDS = """=
from labutils.measurement import ledger
from labutils.lab.widgets.speed_quality import speed_quality_widget
common = {"device": "cpu", "dtype": "float32", "threads": 1, "prompt_tokens": 1, "output_tokens": 1}
common |= {"technique": "x", "samples": [1] * 5, "bits_per_byte": 1}
records = [ledger.Record(model=name, **common) for name in ("first", "second")]"""
# A dropdown takes End, since JupyterLab keeps ArrowDown for itself in command mode.
FOCUS = {"slider": ".noUi-handle", "dropdown": "select", "button": ".jupyter-button"}  # what has it, in each control
NEEDED = {  # words of the cells that a chapter's widgets need
    "01_how_generation_works": [
        *("import statistics\nimport time", "CHARACTERS =", "from labutils.generation.cache import KVCache"),
        *("def full(", "MODELS =", "def memory_table(", RECORDS),
    ],
    "02_quantization_formulas": ["from labutils.lab.layers.linears"],
    "03_quantizing_a_language_model": [
        *(
            "import copy\nimport itertools",
            "statistics = input_statistics(",
            "=look = lambda *_: None",
            "def scheme_of(",
        ),
        *("three_bits_model =", "inverse_factor"),
    ],
}
WIDGETS = {  # words of a widget's cell, a control in it, a key
    "01_how_generation_works": [
        ("slider = ", "slider", "ArrowRight"),
        ("speed_quality_widget(records)", "dropdown", "End"),
    ],
    "02_quantization_formulas": [
        ('picture_slider("cut"', "slider", "ArrowRight"),
        ("quantization_widget(weight)", "slider", "ArrowRight"),
        ("quantization_widget(weight)", "dropdown", "End"),
        ("bits_widget()", "button", "Space"),
        ("bits_widget()", "dropdown", "End"),
    ],
    "03_quantizing_a_language_model": [
        ('picture_slider("tokens"', "slider", "ArrowRight"),
        ('picture_slider("columns"', "slider", "ArrowRight"),
        ('picture_slider("degrees"', "slider", "ArrowRight"),
    ],
}


def cells_with(chapter, words):
    """The first code cell with some words, for each of them; what begins with = is a cell itself."""
    code = [cell for cell in chapter["cells"] if cell["cell_type"] == "code"]
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "id": "own"}
    return [
        {**blank, "source": each[1:]} if each[0] == "=" else next(c for c in code if each in "".join(c["source"]))
        for each in words
    ]


@pytest.mark.parametrize("stem", WIDGETS)
def test_each_widget_answers_a_key(lab, page, stem):
    """Its control takes the focus, a key changes it, and the picture or text beside it follows."""
    root, address = lab
    chapter = json.loads((root / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    wanted = ["# SETUP", *NEEDED[stem], *dict.fromkeys(words for words, _, _ in WIDGETS[stem])]
    chapter["cells"] = cells_with(chapter, wanted)
    path = root / "widgets" / f"{stem}.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(chapter), encoding="utf-8")
    open_notebook(page, address, f"widgets/{path.name}")
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    for index, (words, control, key) in enumerate(WIDGETS[stem]):
        outputs = page.locator(".jp-CodeCell").nth(wanted.index(words)).locator(".jp-OutputArea").first
        outputs.locator(FOCUS[control]).first.wait_for()
        before = outputs.evaluate(SEEN)
        outputs.locator(FOCUS[control]).first.focus()
        page.keyboard.press(key)
        page.wait_for_function(f"([node, old]) => ({SEEN})(node) !== old", arg=[outputs.element_handle(), before])
        shot(page, outputs, f"browser-{stem[:2]}-widget-{index}.png")


SEEN = """node => [...node.querySelectorAll(".widget-html-content, .jupyter-widgets > .widget-label, img")]
    .map(each => each.src || each.innerText).join()"""  # what a learner sees of a widget: its texts and pictures


@pytest.mark.parametrize("stem", ["12_applications", "13_capstone"])
def test_an_executed_chapter_shows_its_figures_formulas_and_sounds(lab, page, stem):
    root, address = lab
    path = root / "executed" / f"{stem}.ipynb"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "notebooks" / "solutions" / path.name, path)
    environment = server_environment(root, root.parent)
    subprocess.run([sys.executable, "-m", "jupyter", "trust", str(path)], env=environment, check=True)  # else no sound
    code = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    data = [output["data"] for c in code for output in c["outputs"] if "data" in output]
    open_notebook(page, address, f"executed/{path.name}")
    figures, sounds = page.locator(".jp-OutputArea img"), page.locator(".jp-OutputArea audio")
    assert figures.count() >= sum("image/png" in each for each in data) > 0
    assert all(figure.evaluate("each => each.complete && each.naturalWidth > 0") for figure in figures.all())
    assert sounds.count() == sum("".join(each.get("text/html", "")).count("<audio") for each in data)
    assert all(sound.evaluate(DURATION) > 0 for sound in sounds.all())
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0 and page.locator("mjx-container").count() > 0
    shot(page, page.locator("body"), f"browser-{stem}.png")


DURATION = """sound => new Promise(found => {
    const tell = () => found(sound.duration || 0);
    sound.onloadedmetadata = sound.onerror = tell;
    setTimeout(tell, 20000);
    sound.load();
})"""


def see_the_plot(page):
    """The speed-quality plot is there, and is a picture of some size."""
    picture = cell(page, "draw_speed_quality([record]").locator(".jp-OutputArea img")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 300 && image.naturalHeight > 200")
    shot(page, picture, "browser-plot.png")


def move_the_slider(page):
    """Tab reaches the slider, an arrow key moves it, and the text beside it follows."""
    outputs = cell(page, "size_slider = ").locator(".jp-OutputArea")
    handle, text = outputs.locator(".noUi-handle"), outputs.locator(".widget-html-content")
    text.get_by_text("tokens/s at best").wait_for()
    before = text.inner_text()
    assert handle.get_attribute("tabindex") == "0"
    handle.focus()
    page.keyboard.press("ArrowRight")
    outputs.locator(".widget-readout", has_text="70B").wait_for()
    text.get_by_text("as fast as you read").wait_for()
    page.wait_for_function("([node, old]) => node.innerText !== old", arg=[text.element_handle(), before])
    shot(page, outputs, "browser-slider.png")


def answer_wrongly_then_rightly(page, check):
    signature = "def tokens_per_second(runs):"
    whole = "whole = [(len(r) - 1) / (r[-1] - r[0]) for r in runs[1:]]"
    gaps = "after = [1 / statistics.median(b - a for a, b in pairwise(r[1:])) for r in runs[1:]]"
    answer(page, "tokens_per_second", signature, whole, gaps, "return statistics.mean(whole), statistics.mean(after)")
    check.get_by_text("you took the mean").wait_for()
    assert "Traceback" not in check.inner_text()
    shot(page, check, "browser-hint.png")
    right = "return statistics.median(whole), statistics.median(after)"
    answer(page, "tokens_per_second", signature, whole, gaps, right)
    check.get_by_text("✓ 0.1 tokens_per_second").wait_for()
    shot(page, check, "browser-tick.png")


def shot(page, locator, name):
    ARTIFACTS.mkdir(exist_ok=True)
    locator.scroll_into_view_if_needed()
    page.screenshot(path=str(ARTIFACTS / name))
