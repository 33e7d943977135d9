"""A small server that speaks enough of OpenAI's protocol for a client's tests."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Speaks just enough of OpenAI's protocol; the question decides what goes wrong."""

    def do_GET(self):
        self.reply(json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((asked, self.headers.get("Authorization")))
        content = asked["messages"][-1]["content"]
        if content == "together":  # answered once as many are there as the server waits for
            self.server.together.wait(timeout=20)
        if content == "refuse":
            self.send_error(418, "no")
            return
        pieces = [
            {"choices": [{"delta": {"content": word}, "finish_reason": None}]}
            for word in (self.server.greeting, content, "é")
        ]
        pieces.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        events = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
        self.reply("".join(events[:2] if content == "break off" else events).encode())

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def chat_server(greeting: str = "Ja, ", together: int = 1) -> Iterator[ThreadingHTTPServer]:
    """A server on a free port of the loopback; `seen` holds what it was asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.greeting, server.together = [], greeting, threading.Barrier(together)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
