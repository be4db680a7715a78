"""Who listens where, asked before anything starts."""
import socket


def port_free(
    host: str, # address to bind
    port: int, # port to bind
) -> bool:     # whether nobody listens there
    "Must be asked: HAProxy shares a busy port without a word, and half of the requests would go elsewhere."
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1) # a port whose last connections still fade counts as free
        try: s.bind((host, port))
        except OSError: return False
    return True

def free_port() -> int: # a loopback port that nobody has
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def reach(
    host: str, # address that a server binds
    port: int, # its port
) -> str:      # http://… for a client on this machine
    "Where to ask a server that binds `host`: one that binds everything answers on loopback."
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
