"""Pages in Markdown: their blocks of code, and what a block of shell asks for."""

import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from subprocess import run
from sys import executable
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^(?P<tick>```+)(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=tick)$", re.MULTILINE | re.DOTALL)
# programs that are not ours, and what a shell brings along
FOREIGN = set("""apt-get argo amtool aws brew cat cd chmod chown cp createdb cosign crontab cut date docker echo export git grep helm htpasswd install jq k3d kaggle kind kubeconform kubectl ls mc minikube mkdir mlflow
    mv nginx npm npx openssl pip promtool pg_dump pg_restore printf psql pytest redis-cli rm sed sh sleep source sort ssh sudo systemctl tail tee touch trivy uv wrk""".split())
LEADING, PASSED = {"do", "then", "else", "if", "while", "until", "!", "{"}, {"for", "done", "fi", "}"} # of the shell's own words
SUBSTITUTED = re.compile(r"\$\(([^()]*)\)")
HOST = "http://127.0.0.1:8000"


class Block(NamedTuple):
    page: str
    line: int
    kind: str    # python, bash, ini …
    text: str
    reason: str  # why it is not run; empty where it is

    @property
    def where(self) -> str: return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README, every page of `docs/`, and the READMEs of what is deployed."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "deploy").rglob("README.md")), ROOT / "data" / "README.md"]
    return [p.relative_to(ROOT).as_posix() for p in found]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(page, text[: m.start()].count("\n") + 1, m["kind"], m["text"], m["reason"] or "") for m in FENCE.finditer(text)]


def blocks_of(*kinds: str) -> list[Block]: return [b for p in pages() for b in blocks(p) if b.kind in kinds and not b.reason]


def commands(shell: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments; a line that ends in a backslash or in a quote goes on."""
    held = ""
    while found := SUBSTITUTED.search(shell): # what stands in $( … ) is a command of its own
        yield from commands(found[1])
        shell = shell.replace(found[0], "SUBSTITUTED", 1)
    for line in shell.splitlines():
        held += line
        if held.endswith("\\"):
            held = held[:-1]
            continue
        lexer = shlex.shlex(held, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        try: words = list(lexer)
        except ValueError: # a quote is open
            held += "\n"
            continue
        held, command = "", []
        for word in [*words, ";"]:
            if not set(word) <= set("|&;"): command.append(word)
            elif command:
                while command and command[0] in LEADING: command = command[1:]
                if command and command[0] not in PASSED: yield command
                command = []
    assert not held.strip(), f"a quote is not closed: {held[:80]}"


@cache
def targets() -> set[str]: return set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def help_of(*program: str) -> str: # empty where it takes no such word
    """What a program of ours says of itself."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = run([executable, *program, "--help"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout if done.returncode == 0 else ""


def faults(words: list[str], keys: set[str]) -> list[str]:
    """What is wrong with a command; `keys` are the names of settings in the environment."""
    found = []
    while words and (m := re.match(r"(\w+)=", words[0])):
        if m[1].startswith("RECO_") and m[1] not in keys: found.append(f"there is no setting {m[1]}")
        words = words[1:]
    if words and words[0] == "export": found += [f"there is no setting {n}" for n in (w.split("=")[0] for w in words[1:]) if n.startswith("RECO_") and n not in keys]
    if not words: return found
    name, rest = words[0].rsplit("/", 1)[-1], words[1:]
    if name == "make": return found + [f"there is no target {w}" for w in rest if re.fullmatch(r"[a-z]+", w) and w not in targets()]
    if re.fullmatch(r"python[\d.]*", name): return found + faults_of_python(rest)
    return found if name in FOREIGN or name == "curl" or ("/" in words[0] and (ROOT / words[0]).is_file()) else [*found, f"{name} is not known: name it in tests/pages.py, or say above the block why it is not run"]


def faults_of_python(rest: list[str]) -> list[str]:
    if rest[:1] == ["-c"]: return []
    program, args = (rest[:2], rest[2:]) if rest[:1] == ["-m"] else (rest[:1], rest[1:])
    if not program: return ["python without a program"]
    file = ROOT / (program[1].replace(".", "/") + ".py" if len(program) == 2 else program[0])
    if not file.is_file(): return [] if program[:1] == ["-m"] and program[1].split(".")[0] not in ("app", "benchmarks", "reco", "flows") else [f"there is no {' '.join(program)}"]
    options = [a.split("=")[0] for a in args if a.startswith("--")]
    words = [a for a in args if not a.startswith("-") and re.fullmatch(r"[a-z][a-z-]+", a)]
    flow, subparsers = file.parent.name == "flows" and "(FlowSpec):" in file.read_text(), "add_subparsers" in file.read_text()
    if not options and not subparsers and not flow: return []
    said = of_flows() + " ".join(f"--{n}" for n in re.findall(r'Parameter\("(\w+)"', file.read_text())) if flow else \
        help_of(*program) + "".join(help_of(*program, w) for w in words[:1] if subparsers and options)
    known = lambda word: re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said)
    missing = [a for a in options if not known(a)] + (words[:1] if words and (flow or subparsers) and not any(map(known, words)) else [])
    return [f"{' '.join(program)} knows no {a}" for a in missing]


def of_flows() -> str: # Metaflow's part, which is the same for each and takes seconds to say
    return help_of("flows/upkeep.py") + help_of("flows/upkeep.py", "run")


class Curl(NamedTuple):
    method: str
    url: str
    headers: dict[str, str]
    body: str


def curl(words: list[str]) -> Curl | None: # None for another host
    """A request to the endpoint, as curl would make it."""
    method, url, headers, body = "", "", {}, ""
    words = iter(words[1:])
    for w in words:
        if w in ("-X", "--request"): method = next(words)
        elif w in ("-H", "--header"): headers |= dict([next(words).split(": ", 1)])
        elif w in ("-d", "--data"): body = next(words)
        elif not w.startswith("-"): url = w
    return Curl(method or ("POST" if body else "GET"), url, headers, body) if url.startswith(HOST) else None
