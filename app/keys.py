"""API keys: who may ask what. A key is a long random word that belongs to a role; it is never logged and never sent back."""
import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from reco.settings import Settings

ROLES = ("client", "admin") # an admin may do what a client may
SHORTEST = 20               # characters; `python -c "import secrets; print(secrets.token_urlsafe(32))"` makes 43


class KeysError(ValueError):
    "The keys of the settings cannot be used; the message says where and why, without a key."


@dataclass(frozen=True)
class Keys:
    "Keys by role, as digests."
    digests: tuple[tuple[bytes, str], ...] # SHA-256 of a key, its role

    def __bool__(self) -> bool: return bool(self.digests)

    def role(self,
        given: str, # what the request brought
    ) -> str|None:  # the role of the key; None for one that nobody has
        "Whose key it is. Every key is compared, in the same time whatever is alike."
        digest, found = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest(), None
        for known, role in self.digests:
            if hmac.compare_digest(digest, known): found = role
        return found


def in_file(
    path: Path, # lines of a role and a key; empty lines and lines with # in front are passed over
) -> list[tuple[str, str]]: # role and key
    "The keys of a file; raises `KeysError` naming the line."
    try: lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e: raise KeysError(f"[serving] keys_file {path}: {type(e).__name__}") from None
    found = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"): continue
        if len(words) != 2 or words[0] not in ROLES:
            raise KeysError(f"[serving] keys_file {path}, line {number}: a role ({' or '.join(ROLES)}) and a key are needed, there are {len(words)} words")
        found.append((words[0], words[1]))
    return found


def load_keys(
    settings: Settings, # [serving] client_keys, admin_keys and keys_file
) -> Keys:
    "The keys of the settings; raises `KeysError` for one that is too short or has two roles."
    serving = settings.serving
    given = [(role, key) for role in ROLES for key in getattr(serving, f"{role}_keys").get_secret_value().split()]
    if serving.keys_file: given += in_file(settings.path(serving.keys_file))
    for role, key in given:
        if len(key) < SHORTEST: raise KeysError(f"[serving] a key of a {role} has {len(key)} characters; at least {SHORTEST} are needed")
    of: dict[str, set[str]] = {}
    for role, key in given: of.setdefault(key, set()).add(role)
    if twice := sum(len(roles) > 1 for roles in of.values()): raise KeysError(f"[serving] {twice} keys belong to a client and to an admin")
    return Keys(tuple((hashlib.sha256(key.encode()).digest(), roles.pop()) for key, roles in of.items()))


def loopback(
    host: str, # an address or a name
) -> bool:
    "Whether only this machine can reach it."
    if host == "localhost": return True
    try: return ipaddress.ip_address(host).is_loopback
    except ValueError: return False


def keys_for(
    settings: Settings,
) -> Keys: # none when the endpoint is for this machine alone and no key is set: then everybody may do everything
    "The keys that the endpoint needs; raises `KeysError` when it would be open to other machines without any."
    keys = load_keys(settings)
    if keys or loopback(settings.serving.host): return keys
    raise KeysError(f"[serving] host {settings.serving.host} can be reached by other machines and there is no key: "
                    "set RECO_SERVING_CLIENT_KEYS and RECO_SERVING_ADMIN_KEYS, or name a keys_file")
