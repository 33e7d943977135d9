"""A port of the loopback that nobody listens on."""

import socket


def free_port() -> int:
    """Free at this moment; the system seldom gives it away again soon."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
