"""`python -m app.alive URL …`: whether each answers with 200, for containers' health checks. It needs nothing but Python: it is started every few seconds."""
import http.client
import sys
from urllib.parse import urlsplit

WAIT_S = 3


def trouble(
    url: str, # http://host:port/path
) -> str:     # what is wrong; empty when it answers
    "Ask once; no proxy and no other address that an answer may name."
    at = urlsplit(url)
    if at.scheme != "http" or not at.hostname: return f"{url} is no http://host:port/path"
    link = http.client.HTTPConnection(at.hostname, at.port or 80, timeout=WAIT_S)
    try:
        link.request("GET", at.path or "/")
        status = link.getresponse().status
    except (OSError, http.client.HTTPException) as e: return f"{url}: {type(e).__name__}"
    finally: link.close()
    return "" if status == 200 else f"{url} answers with {status}"


def main(
    argv: list[str], # addresses
) -> int:            # exit code
    "Ask all of them."
    found = [said for url in argv if (said := trouble(url))] if argv else ["an address is needed, such as http://127.0.0.1:8000/health"]
    for said in found: print(said, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
