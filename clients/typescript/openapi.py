"""The OpenAPI document of the endpoint, on standard output: what `make client` makes types of."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # for `app`, which is no installed package

from app.contract import create_app  # noqa: E402

if __name__ == "__main__": json.dump(create_app(SimpleNamespace(meter=None)).openapi(), sys.stdout, indent=1) # describing routes needs nothing of what answers
