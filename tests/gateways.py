"""A real NGINX with the gateway's own configuration, in front of whatever a test puts behind it."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.ports import free_port, port_free

FOLDER = Path(__file__).parents[1] / "deploy" / "nginx"
DEFAULTS = {"NGINX_MODE": "plain", "NGINX_KEY_RATE": "200r/s", "NGINX_KEY_BURST": "400", "NGINX_ADDRESS_RATE": "200r/s", "NGINX_ADDRESS_BURST": "400", "NGINX_CONNECTIONS": "64"}


def filled(text: str, values: dict[str, str]) -> str:
    """As the image's envsubst does it: names that are set, in braces or not; everything else stays."""
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: values.get(m[1] or m[2], m[0]), text)


def configured(root: Path, values: dict[str, str], keys: dict[str, str], people: str = "") -> Path:
    """nginx.conf and conf.d/ as they are in the image, below `root`; the main file."""
    (root / "conf.d").mkdir()
    (root / "secrets").mkdir()
    (root / "secrets" / "keys.map").write_text("".join(f'"{key}" {role};\n' for key, role in keys.items()))
    (root / "secrets" / "people").write_text(people)
    every = DEFAULTS | {"NGINX_CONFIG": str(root / "conf.d"), "NGINX_SECRETS": str(root / "secrets")} | values
    for template in (FOLDER / "templates").iterdir():
        text = filled(template.read_text(), every)
        assert "${" not in text, f"{template.name}: {re.findall(r'[$][{][^}]*', text)}"
        (root / "conf.d" / template.name.removesuffix(".template")).write_text(text)
    main = (FOLDER / "nginx.conf").read_text().replace("/tmp/nginx", f"{root}/nginx").replace("/etc/nginx/conf.d", str(root / "conf.d")).replace("/dev/stderr", f"{root}/error.log")
    (root / "nginx.conf").write_text(main)
    reco = root / "conf.d" / "reco.conf"
    reco.write_text(reco.read_text().replace("/dev/stdout", f"{root}/access.log"))
    return root / "nginx.conf"


def program() -> str:
    """NGINX; skips the test without it. Debian keeps it out of the path of ordinary users."""
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx") or pytest.skip("needs nginx: make services")


@contextmanager
def gateway(upstreams: dict[str, int], keys: dict[str, str], people: str = "", files: dict[str, str] | None = None, **values: str) -> Iterator[tuple[int, Path]]:
    """Its port, and the folder of its logs; `upstreams`: endpoint, app, mlflow, grafana → port, what is not named is not there; `files`: more secrets."""
    root, listen = Path(tempfile.mkdtemp(prefix="nginx")), values.pop("NGINX_LISTEN", f"127.0.0.1:{free_port()}")
    port = int(re.search(r":(\d+)", listen)[1])
    named = {f"NGINX_{n.upper()}": f"127.0.0.1:{upstreams.get(n) or free_port()}" for n in ("endpoint", "app", "mlflow", "grafana")}
    root.chmod(0o755) # workers of a master that is root are nobody
    try:
        main = configured(root, {"NGINX_REDIRECT": f"127.0.0.1:{free_port()}"} | named | {"NGINX_LISTEN": listen} | values, keys, people)
        for name, text in (files or {}).items(): (root / "secrets" / name).write_text(text)
        command = [program(), "-e", str(root / "error.log"), "-c", str(main), "-g", "daemon off;" + (" user root;" if not os.getuid() else "")]
        tried = subprocess.run([*command[:-1], command[-1].replace("daemon off;", ""), "-t"], capture_output=True, text=True)
        assert tried.returncode == 0, tried.stderr
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        until = time.monotonic() + 20
        while port_free("127.0.0.1", port) and time.monotonic() < until and server.poll() is None: time.sleep(0.02)
        assert server.poll() is None, (root / "error.log").read_text()
        try: yield port, root
        finally:
            server.terminate()
            server.wait(20)
    finally: shutil.rmtree(root)
