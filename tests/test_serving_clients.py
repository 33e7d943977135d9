"""The server asked by curl and by pages in a real browser; OpenAI's own client is in test_serving_server.py."""

import json
import shutil
import subprocess

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed: labutils test does")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed: labutils test does")

from serving_server import NAME, decode, encode, running, tiny_engine
from starlette.responses import HTMLResponse
from starlette.routing import Route
from test_browser import FLAGS, browser_path

from labutils.serving.engine import run
from labutils.serving.scheduler import Request

COUNT = 12
FORMS = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}
PAGES = [Route("/page", lambda request: HTMLResponse("<title>a page</title>"))]
ASK = """async ([url, data]) => {
    try {
        const body = data && JSON.stringify(data);
        const headers = {"Content-Type": "application/json"};
        const response = await fetch(url, data ? {method: "POST", headers, body} : {});
        const reader = response.body.getReader(), decoder = new TextDecoder(), parts = [];
        for (let part = await reader.read(); !part.done; part = await reader.read())
            parts.push(decoder.decode(part.value, {stream: true}));
        return {status: response.status, parts};
    } catch (error) { return {error: error.name}; }
}"""


def question(path, *, stream):
    return FORMS[path] | {"model": NAME, "temperature": 0, "max_tokens": COUNT, "stream": stream}


def truth():
    return decode(run(tiny_engine(), [Request(encode("Hello"), max_new_tokens=COUNT)])[0].new_ids)


def text_of(choice):
    """The text of a whole answer or of one event, in either form."""
    inner = choice.get("message") or choice.get("delta") or choice
    return inner.get("content") or inner.get("text") or ""


def streamed_text(received):
    lines = [line.removeprefix("data: ") for line in received.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return "".join(text_of(json.loads(line)["choices"][0]) for line in lines[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("path", FORMS)
def test_curl_gets_whole_and_streamed_answers_and_errors(path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def curl(data, key="secret"):
        command = ["curl", "-sS", "-N", "--max-time", "30", f"http://127.0.0.1:{port}{path}", "-d", json.dumps(data)]
        headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}"]
        result = subprocess.run([*command, *headers], capture_output=True, encoding="utf-8", check=True, timeout=60)
        return result.stdout

    with running(tiny_engine(), key="secret") as port:
        assert text_of(json.loads(curl(question(path, stream=False)))["choices"][0]) == truth()
        assert streamed_text(curl(question(path, stream=True))) == truth()
        assert json.loads(curl(question(path, stream=False), key="other"))["error"]["code"] == "invalid_api_key"
        assert json.loads(curl({"model": NAME}))["error"]["param"] in ("prompt", "messages")


@pytest.fixture
def page():
    sync_api = pytest.importorskip("playwright.sync_api")
    if browser_path() is None:
        pytest.skip("no Chromium on PATH; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=list(FLAGS))
        yield browser.new_page()
        browser.close()


@pytest.mark.slow
@pytest.mark.browser
def test_a_page_of_the_same_origin_streams_and_one_of_another_reads_nothing(page):
    engine = tiny_engine(delay_s=0.02)  # slow enough for an answer to arrive in parts
    with running(engine, pages=PAGES) as port, running(tiny_engine(), pages=PAGES) as other:
        page.goto(f"http://127.0.0.1:{port}/page")
        for path in FORMS:
            whole = page.evaluate(ASK, [path, question(path, stream=False)])
            assert text_of(json.loads("".join(whole["parts"]))["choices"][0]) == truth()
            streamed = page.evaluate(ASK, [path, question(path, stream=True)])
            assert streamed_text("".join(streamed["parts"])) == truth() and len(streamed["parts"]) > 3
        steps = engine.steps
        page.goto(f"http://127.0.0.1:{other}/page")
        for path in FORMS:
            refused = page.evaluate(ASK, [f"http://127.0.0.1:{port}{path}", question(path, stream=True)])
            assert refused == {"error": "TypeError"}
        assert page.evaluate(ASK, [f"http://127.0.0.1:{port}/v1/models", None]) == {"error": "TypeError"}
        assert engine.steps == steps  # the browser asked first, and nothing was computed
