"""Sends each body back and parses nothing: what uvicorn and the load generator can do at most."""

from typing import Any

from benchmarks.servers.layer import arguments, run


async def app(_scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with the same body (ASGI)."""
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    run(app, arguments().port)
