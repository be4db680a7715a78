"""`python -m app.cluster`: the file for `serve deploy` on a Ray cluster, made of the settings. `serve build app.cluster:endpoint` is what it starts from."""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from app.meter import FOLDER
from app.serve import ONE_THREAD, application
from reco.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from ray.serve import Application

HEAD = """\
# For `serve deploy`, made by `{command} python -m app.cluster`.
# Each node needs this package, the settings (RECO_SETTINGS, or RECO_… beside those below) and, at the same path, the folder of the bundles; Redis has
# to be a server (RECO_ONLINE_URL). Keys are asked for as soon as the host is not loopback: RECO_SERVING_CLIENT_KEYS and RECO_SERVING_ADMIN_KEYS.
# `ray start` needs RAY_SERVE_THROUGHPUT_OPTIMIZED=1 and RAY_SERVE_ENABLE_HA_PROXY=1 in its environment: without them Serve is ten times slower.
"""

def arguments_of(
    settings: Settings, # [serving]
) -> dict[str, int]:    # of `app.serve.application`; bundles are the settings' own, as each node finds them
    "How many replicas."
    return {"replicas": settings.serving.replicas, "max_replicas": settings.serving.max_replicas}

def __getattr__(name: str) -> "Application": # `serve build` imports the name `endpoint`; for anything else Ray is not needed
    if name == "endpoint": return application(arguments_of(load_settings()))
    raise AttributeError(name)

def built() -> dict: # what `serve build` makes of `endpoint`
    "The parts that Ray knows of; raises `CalledProcessError`."
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        subprocess.run([Path(sys.executable).with_name("serve"), "build", "app.cluster:endpoint", "-o", file.name], check=True, capture_output=True)
        return yaml.safe_load(Path(file.name).read_text())

def complete(
    found: dict,        # of `built`
    settings: Settings, # [serving]
) -> dict:
    "What Ray cannot know: where to listen, and what each replica has in its environment. A replica asks for keys if the host is not loopback."
    app, serving = found["applications"][0], settings.serving
    app |= {"name": "default", "import_path": "app.serve:application", "args": arguments_of(settings),
            "runtime_env": {"env_vars": ONE_THREAD | {"RECO_SERVING_HOST": serving.host, FOLDER: "/tmp/reco-metrics"}}}
    return {"proxy_location": "EveryNode", "http_options": {"host": serving.host, "port": serving.port},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False}, "applications": [app]}

def main() -> int: # exit code
    parser = argparse.ArgumentParser(prog="python -m app.cluster", description=__doc__)
    parser.add_argument("--output", type=Path, help="file to write; printed if not given")
    args = parser.parse_args()
    try:
        settings = load_settings()
        made = complete(built(), settings)
    except SettingsError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as e:
        print(f"error: serve build: {e.stderr.decode().strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    said = {"host": settings.serving.host} | arguments_of(settings)
    text = HEAD.format(command=" ".join(f"RECO_SERVING_{k.upper()}={v}" for k, v in said.items())) + yaml.safe_dump(made, sort_keys=False, width=120)
    if args.output is None: print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    return 0

if __name__ == "__main__": sys.exit(main())
