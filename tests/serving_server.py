"""A tiny model behind a real server on the loopback: in a thread for tests, or as a program of its own."""

import argparse
import contextlib
import json
import socket
import threading
import time

import uvicorn
from tiny_models import tiny_model

from labutils.generation.fast_llama import FastLlama
from labutils.serving.connections import bounded_http
from labutils.serving.engine import Engine
from labutils.serving.paged import PagedLlama
from labutils.serving.scheduler import Limits
from labutils.serving.server import Bounds, Served, make_app
from labutils.serving.service import Service

NAME = "tiny"


def encode(text):
    """One token a character of ASCII."""
    return [ord(c) % 95 for c in text]


def decode(ids):
    return "".join(chr(32 + i) for i in ids)


def encode_chat(messages):
    return encode("".join(m["content"] for m in messages))


def tiny_engine(*, delay_s=0.0, **limits):
    settings = {"token_budget": 32, "max_running": 8, "max_waiting": 100, "max_positions": 128} | limits
    model = PagedLlama(FastLlama(tiny_model("llama-gqa-tied"), max_length=512, matvec="numpy"), block_size=8)
    engine = Engine(model, Limits(**settings))
    if delay_s:
        engine.model = lambda step: (time.sleep(delay_s), model(step))[1]
    return engine


@contextlib.contextmanager
def running(engine, *, key=None, host="127.0.0.1", pages=None, small_buffers=False, **bounds):
    """The port of a server in a thread; `pages` are more routes, and small buffers fill up with one answer."""
    with Service(engine, decode) as service, socket.create_server((host, 0)) as listening:
        if small_buffers:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the system's smallest
        bounds = Bounds(**bounds)
        app = make_app(service, Served(NAME, 97, encode_chat, encode, frozenset()), key=key, bounds=bounds)
        app.router.routes += pages or []
        options = {"http": bounded_http(bounds), "ws": "none", "log_level": "critical", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not stop"


def head(port, length, path="/v1/completions", **headers):
    """The first lines of a request, for sockets that then misbehave."""
    lines = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Content-Length": length} | headers
    return (f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


def send(port, data, *, small_buffer=False, **headers):
    """A connected socket that has sent a whole request for a completion."""
    body = json.dumps({"model": NAME, "temperature": 0} | data).encode()
    client = socket.socket()
    client.settimeout(60)
    if small_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.connect(("127.0.0.1", port))
    client.sendall(head(port, len(body), **headers) + body)
    return client


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--key")
    with running(tiny_engine(max_waiting=32), key=parser.parse_args().key) as at:
        print(at, flush=True)
        input()  # until its parent closes the pipe
