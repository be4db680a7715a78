"""What an image of deploy/docker is, without an engine: its install steps are replayed into empty folders, and its programs run in a sandbox of bubblewrap
that has the image's paths, its user, its variables, a root file system that cannot be written, and nothing of this checkout.

What stands in: the distribution below (this machine's, not python:3.11-slim) and its Python. Steps that want to be root of a whole file system (apt-get,
groupadd) are not replayed. PyTorch comes from PIP_FIND_LINKS where that is set, as in the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "docker"
NOT_REPLAYED = re.compile(r"^(apt-get|groupadd) ")
USER = 10001


def sandbox_program() -> str:
    """bubblewrap, where it may make a sandbox; skips the test elsewhere."""
    program = shutil.which("bwrap") or pytest.skip("needs bubblewrap: make services")
    tried = subprocess.run([program, "--ro-bind", "/", "/", "--unshare-user", "--unshare-pid", "--unshare-net", "--proc", "/proc", "true"], capture_output=True, text=True)
    if tried.returncode: pytest.skip(f"bubblewrap may not make a sandbox here: {tried.stderr.strip()}")
    if not shutil.which("tini"): pytest.skip("needs tini: make services")
    return program


def instructions(text: str) -> list[tuple[str, str]]:
    """(RUN, what), lines that go on put together, comments left out."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    return [(word, rest.strip()) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]]


@dataclass
class Image:
    """What an engine would keep of a Dockerfile's last stage."""

    folder: Path                                       # opt/venv and srv/reco are below it
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)


def listed(text: str) -> list[str]:
    """`["a", "b"]`."""
    return re.findall(r'"([^"]*)"', text)


def expanded(text: str, env: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: env.get(m[1] or m[2], ""), text)


def assigned(text: str) -> dict[str, str]:
    """`NAME=value NAME="value with blanks"`."""
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', text)}


def context() -> list[Path]:
    """What .dockerignore lets through, of what git would commit."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let = [line[1:] for line in lines if line.startswith("!")]
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(f) for f in files if any(f == x or f.startswith(f"{x}/") for x in let) and (ROOT / f).is_file()]


def below() -> list[str]:
    """Options of bubblewrap: this machine's distribution and Python under an empty root."""
    options = ["--tmpfs", "/"]
    for name in ("usr", "lib", "lib32", "lib64", "bin", "sbin", "etc"):
        path = Path("/", name)
        if path.is_symlink(): options += ["--symlink", os.readlink(path), str(path)]
        elif path.exists(): options += ["--ro-bind", str(path), str(path)]
    if not sys.base_prefix.startswith("/usr"): options += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    return [*options, "--dev", "/dev", "--proc", "/proc"]


def built(name: str, folder: Path, args: dict[str, str] | None = None) -> Image:
    """The image of `NAME.Dockerfile`: packages installed, files copied; fails with what a step said."""
    image, env, stage, copied = Image(folder), dict(args or {}), "", context()
    for part in ("opt/venv", "srv/reco", "build", "base"): (folder / part).mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "base"], check=True)
    workdir = "/"
    for word, rest in instructions((FOLDER / f"{name}.Dockerfile").read_text()):
        if word == "FROM": stage, env = rest.partition(" AS ")[2], dict(args or {})
        elif word == "ARG":
            key, _, default = rest.partition("=")
            env.setdefault(key, default.strip('"'))
        elif word == "ENV": env |= {k: expanded(v, env | {"PATH": "/usr/local/bin:/usr/bin:/bin"}) for k, v in assigned(rest).items()}
        elif word == "WORKDIR": workdir = rest
        elif word == "RUN" and stage == "packages": replay(rest, folder, env)
        elif word == "RUN": assert all(NOT_REPLAYED.match(p.strip()) or p.strip().startswith(("useradd", "install -d", "rm -rf")) for p in rest.split("&&")), rest
        elif word == "COPY" and rest.startswith("--from=packages"): assert rest.split()[1:] == ["/opt/venv", "/opt/venv"]
        elif word == "COPY": copy(rest.split(), folder / workdir.lstrip("/"), copied)
        elif word == "USER": image.user = rest
        elif word == "ENTRYPOINT": image.entrypoint = listed(rest)
        elif word == "CMD": image.command = listed(rest)
        elif word == "HEALTHCHECK": image.health = listed(rest[rest.index("CMD"):])
        elif word == "EXPOSE": image.ports = [int(p) for p in rest.split()]
        else: raise AssertionError(f"{name}.Dockerfile: {word} is not known here")
    image.env, image.workdir = {k: v for k, v in env.items() if k != "PYTHON"}, workdir
    return image


def copy(words: list[str], target: Path, known: list[Path]) -> None:
    """Files of the context, as COPY does: a folder's content into the folder that is named last."""
    *sources, last = words
    for source in sources:
        found = [f for f in known if str(f) == source or str(f).startswith(f"{source}/")]
        assert found, f"COPY {source}: nothing of that name passes .dockerignore"
        for file in found:
            to = target / (last if str(file) != source else "" if last == "./" else last) / (file.relative_to(source) if str(file) != source else file.name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, to)


def replay(command: str, folder: Path, env: dict[str, str]) -> None:
    """One step of the stage that installs, where only /base, /build and /opt/venv can be written. Caches are used: what they keep was fetched by the same rules."""
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    if links: command = command.replace("--torch-backend=cpu", " ".join(f"--find-links {d}" for d in links))
    cache = subprocess.run([Path(sys.executable).with_name("uv"), "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    Path(cache).mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_")) or k.lower().endswith("_proxy")}
    given = kept | {k: v for k, v in env.items() if k not in ("UV_NO_CACHE", "PIP_NO_CACHE_DIR")} | {"PATH": "/base/bin:/usr/bin:/bin", "HOME": "/tmp", "UV_CACHE_DIR": cache}
    copies = [f for f in ("pyproject.toml", "requirements.lock")]
    for f in copies: shutil.copy2(ROOT / f, folder / "build" / f)
    binds = [("--bind", folder / part, f"/{part}") for part in ("base", "build", "opt/venv")] + [("--bind", cache, cache)] + [("--ro-bind", d, d) for d in links if Path(d).is_dir()]
    options = [*below(), *[str(x) for bind in binds for x in bind], "--tmpfs", "/tmp", "--chdir", "/build", "--die-with-parent", "--clearenv"]
    # the empty environment was made elsewhere: its Python finds it by where it is started
    done = subprocess.run([sandbox_program(), *options, *[x for k, v in given.items() for x in ("--setenv", k, v)], "sh", "-ec", expanded(command, env)],
                          capture_output=True, text=True, timeout=1_000)
    assert done.returncode == 0, f"RUN {command}: {done.stdout[-2_000:]}{done.stderr[-4_000:]}"


class Program:
    """A container that runs, or did."""

    def __init__(self, process: subprocess.Popen, log: Path): self.process, self.log = process, log

    @property
    def inner(self) -> psutil.Process:
        """The sandbox's first process, which is what an engine sends signals to."""
        return psutil.Process(self.process.pid).children()[0]

    def said(self) -> str: return self.log.read_text(errors="replace")

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM; the exit code. Fails when it does not end in time."""
        if self.process.poll() is None:
            try: self.inner.terminate()
            except (IndexError, psutil.NoSuchProcess): pass
        try: return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
            pytest.fail(f"not ended {seconds} s after SIGTERM: {self.said()[-2_000:]}")

    def memory_mb(self) -> float:
        """Proportional set size of all its processes: shared pages count once."""
        found = [self.inner, *self.inner.children(recursive=True)]
        return sum(p.memory_full_info().pss for p in found) / 1e6


def options(image: Image, env: dict[str, str], volumes: dict[str, Path], read_only: dict[str, Path], memory: list[str], hosts: Path | None) -> list[str]:
    """Of bubblewrap, for one container."""
    users = image.folder / "passwd"
    users.write_text(f"root:x:0:0::/root:/bin/sh\nreco:x:{USER}:{USER}::/tmp:/usr/sbin/nologin\n")
    found = [*below(), "--ro-bind", str(users), "/etc/passwd"]
    if hosts: found += ["--ro-bind", str(hosts), "/etc/hosts"]
    for part in ("opt/venv", "srv/reco"): found += ["--ro-bind", str(image.folder / part), f"/{part}"]
    for target in memory: found += ["--tmpfs", target]
    for target, path in volumes.items(): found += ["--bind", str(path), target]
    for target, path in read_only.items(): found += ["--ro-bind", str(path), target]
    found += ["--tmpfs", "/dev/shm", "--remount-ro", "/", "--chdir", image.workdir, "--clearenv"]
    return [*found, *[x for k, v in (image.env | env).items() for x in ("--setenv", k, v)]]


def started(image: Image, log: Path, command: list[str] | None = None, env: dict[str, str] | None = None, volumes: dict[str, Path] | None = None,
            read_only: dict[str, Path] | None = None, memory: tuple[str, ...] = ("/tmp",), hosts: Path | None = None) -> Program:
    """Run a container's program as its user, first of its own processes, on this network."""
    assert image.user == f"{USER}:{USER}" and image.entrypoint == ["tini", "--"]
    told = options(image, env or {}, volumes or {}, read_only or {}, list(memory), hosts)
    call = [sandbox_program(), "--unshare-user", "--uid", str(USER), "--gid", str(USER), "--unshare-pid", "--as-pid-1", "--die-with-parent", *told,
            *image.entrypoint, *(command or image.command)]
    with log.open("ab") as out: process = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    until = time.monotonic() + 10
    while process.poll() is None and not psutil.Process(process.pid).children() and time.monotonic() < until: time.sleep(0.01)
    return Program(process, log)


def ran(image: Image, log: Path, command: list[str], seconds: float = 60, **more: object) -> tuple[int, str]:
    """Exit code and words of a program that ends by itself."""
    begin = len(log.read_text()) if log.exists() else 0
    program = started(image, log, command, **more)
    code = program.process.wait(seconds)
    return code, program.said()[begin:]
