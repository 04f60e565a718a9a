"""nginx as docs/how-to/behind-a-proxy.md sets it up, with other paths, names and ports."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.acceptance.docs.executable_pages import ADDRESS, ROOT
from tests.support.certificates import trusting
from tests.support.external_programs import program
from tests.support.service import eventually, free_port

PAGE = (ROOT / "docs" / "how-to" / "behind-a-proxy.md").read_text()
CONFIG, ASKING = re.findall(r"```nginx\n(.*?)```", PAGE, re.DOTALL)
PASSWORD = ("alice", "correct horse battery")
_MAIN = """
daemon off;
worker_processes 1;
{user}
error_log stderr;
pid {folder}/nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {site}
}}
"""


class Proxy:
    """Where it is, and what on the page is called otherwise here."""

    def __init__(self, folder: Path, service: str) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as held:  # so that they are two
            self.port, self.plain_port = free_port(), held.getsockname()[1]
        self.url = f"https://localhost:{self.port}"
        self._names = {
            "/etc/nginx/": f"{folder}/",
            "/etc/ssl/loraplex/": f"{folder}/",
            "/var/log/nginx/": f"{folder}/",
            ADDRESS: service,
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "listen 443 ": f"listen 127.0.0.1:{self.port} ",
            "server_name loraplex.example.com": "server_name localhost",
            "loraplex.example.com": f"localhost:{self.port}",
        }

    def here(self, text: str) -> str:
        """The page's text with this machine's names."""
        for name, ours in self._names.items():
            text = text.replace(name, ours)
        return text

    def client(self, *, auth: tuple[str, str] | None = PASSWORD) -> httpx.Client:
        """Talks through the proxy."""
        return httpx.Client(base_url=self.url, verify=trusting(self.folder / "fullchain.pem"), auth=auth, timeout=30)

    @contextmanager
    def running(self, site: str) -> Iterator[None]:
        """nginx with this configuration of a site."""
        nginx = program("nginx")
        user = "user root;" if os.geteuid() == 0 else ""
        config = self.folder / "nginx.conf"
        config.write_text(_MAIN.format(folder=self.folder, site=self.here(site), user=user))
        with (self.folder / "errors.log").open("wb") as log:
            process = subprocess.Popen([nginx, "-p", self.folder, "-c", config, "-e", "stderr"], stderr=log)
        try:
            eventually(lambda: self._answers(process), what="nginx")
            yield
        finally:
            process.terminate()
            process.wait(30)

    def _answers(self, process: "subprocess.Popen[bytes]") -> bool:
        assert process.poll() is None, (self.folder / "errors.log").read_text()
        try:
            with self.client() as client:
                return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False
