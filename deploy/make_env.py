"""`make env`: .env from .env.example with secrets of its own, and deploy/secrets/ from .env. What is there stays; needs nothing but Python.

After a change of a key in .env run it again: the gateway's and Prometheus' files follow."""
import base64
import hashlib
import os
import re
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_WEBHOOK = "http://127.0.0.1:9/no-webhook-is-set" # Alertmanager wants an address
KEY = re.compile(r"[A-Za-z0-9_.~+/=-]{20,}")          # what a header, a file of nginx and [serving] take
PLAIN = re.compile(r"[A-Za-z0-9_-]+")                 # what is safe within an address
IN_ADDRESSES = "REDIS_PASSWORD", "SHOP_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "OPTUNA_DB_PASSWORD"


class EnvError(ValueError):
    "The file cannot be used; the message names line or variable, never a value."


def lines_of(
    text: str,        # of .env or .env.example
) -> dict[str, str]:  # variable → value, in order
    "Raises `EnvError`."
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"): continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name): raise EnvError(f"line {number}: NAME=value is needed")
        if name in found: raise EnvError(f"line {number}: {name} is there twice")
        found[name] = value.strip()
    return found


def filled(
    example: str,        # text of .env.example
    have: dict[str, str], # variables of .env, which win
) -> str:
    "The example with what is there, and new secrets for what is not; variables that the example does not know stay at the end."
    out, wanted = [], lines_of(example)
    for line in example.splitlines():
        name, equals, value = line.partition("=")
        if name not in wanted or not equals or line.startswith("#"): out.append(line)
        else: out.append(f"{name}={have.get(name, secrets.token_hex(20) if value == 'secret' else value)}")
    more = [f"{name}={value}" for name, value in have.items() if name not in wanted]
    return "\n".join(["# Secrets: not for git, not for messages.", *out[1:], *more]) + "\n"


def checked(
    env: dict[str, str],
) -> dict[str, list[str]]: # role → keys
    "The API's keys; raises `EnvError` for what a program behind would stumble over."
    roles = {"client": [*env["CLIENT_KEYS"].split(), env["PROMETHEUS_KEY"]], "admin": [*env["ADMIN_KEYS"].split(), env["APP_KEY"]]}
    for role, keys in roles.items():
        for key in keys:
            if not KEY.fullmatch(key): raise EnvError(f"a key of a {role} needs at least 20 letters, digits or -_.~+/=; one has {len(key)} characters, or others")
    if both := {*roles["client"]} & {*roles["admin"]}: raise EnvError(f"{len(both)} keys are a client's and an admin's")
    for name in IN_ADDRESSES:
        if not PLAIN.fullmatch(env[name]): raise EnvError(f"{name} is part of an address: letters, digits, - and _ only")
    return roles


def ssha(
    password: str,
) -> str:
    "A line's second half of nginx's auth_basic_user_file: salted SHA-1 (RFC 2307), enough for 160 random bits and no less."
    salt = secrets.token_bytes(8)
    return "{SSHA}" + base64.b64encode(hashlib.sha1(password.encode() + salt).digest() + salt).decode()


def files_of(
    env: dict[str, str],
) -> dict[str, str]: # name → text
    "What programs read from files: the gateway's keys and people, Prometheus' key, Alertmanager's addresses."
    roles, hook = checked(env), env.get("ALERTS_WEBHOOK") or NO_WEBHOOK
    return {"keys.map": "".join(f'"{key}" {role};\n' for role, keys in roles.items() for key in keys), "people": f"reco:{ssha(env['PEOPLE_PASSWORD'])}\n",
            "reco_key": f"{env['PROMETHEUS_KEY']}\n", "page_url": f"{hook}\n", "tell_url": f"{hook}\n"}


def put(
    path: Path,
    text: str,
    mode: int,
) -> None:
    "Whole or not at all."
    part = path.with_name(f".{path.name}.tmp")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file: file.write(text)
    part.chmod(mode) # whatever the umask
    part.replace(path)


def main(
    root: Path = ROOT,
) -> int: # exit code
    "Write what is missing."
    env_file, folder = root / ".env", root / "deploy" / "secrets"
    try:
        have = lines_of(env_file.read_text("utf-8")) if env_file.exists() else {}
        text = filled((root / ".env.example").read_text("utf-8"), have)
        env = lines_of(text)
        files = files_of(env)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700) # containers have users of their own: the files are readable, the folder is not
        put(env_file, text, 0o600)
        for name, content in files.items(): put(folder / name, content, 0o644)
    except (EnvError, OSError, UnicodeDecodeError) as e:
        print(f"make env: {env_file}: {e}", file=sys.stderr)
        return 1
    new = [name for name in env if name not in have]
    print(f"{env_file}: {f'{len(new)} variables written' if new else 'nothing new'}, {len(files)} files in {folder}; people sign in as reco with PEOPLE_PASSWORD")
    return 0


if __name__ == "__main__": sys.exit(main())
