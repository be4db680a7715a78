"""The file for `serve deploy`: really built, valid for Ray, and the one that is committed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.serve import application, scale

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "deploy" / "ray" / "serve.yaml"
SAID = {"RECO_SERVING_HOST": "0.0.0.0", "RECO_SERVING_REPLICAS": "2", "RECO_SERVING_MAX_REPLICAS": "8"}


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RECO_")}
    return subprocess.run([sys.executable, "-m", "app.cluster", *args], cwd=ROOT, env=plain | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built() -> str:
    done = command(**SAID)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_committed_file_is_what_serve_build_makes(built):
    assert built == COMMITTED.read_text() and " ".join(f"{k}={v}" for k, v in SAID.items()) + " python -m app.cluster" in built
    assert str(ROOT) not in built and "password" not in built


def test_ray_accepts_it_and_scales_it(built):
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema
    said = yaml.safe_load(built)
    [app] = ServeDeploySchema.model_validate(said).applications
    [deployment] = app.deployments
    assert (app.import_path, app.args) == ("app.serve:application", {"replicas": 2, "max_replicas": 8})
    assert deployment.name == "recommendations" and deployment.user_config == {"bundle": ""} and deployment.max_ongoing_requests == 100
    scaled = AutoscalingConfig(**deployment.autoscaling_config)
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (2, 8, 2)
    assert app.runtime_env["env_vars"]["RECO_SERVING_HOST"] == said["http_options"]["host"] == "0.0.0.0"  # so replicas ask for keys
    with pytest.raises(ValueError, match="max_replicas"): AutoscalingConfig(**deployment.autoscaling_config | {"max_replicas": 1})
    with pytest.raises(ValueError, match="max_ongoing_requests"):  # the check can fail
        ServeDeploySchema.model_validate(said | {"applications": [said["applications"][0] | {"deployments": [
            {"name": "recommendations", "max_ongoing_requests": 0}]}]})


@pytest.mark.parametrize(("args", "least", "most"), [({}, 1, 1), ({"replicas": 3}, 3, 3), ({"replicas": "2", "max_replicas": "2"}, 2, 2),
                                                     ({"replicas": 2, "max_replicas": 1}, 2, 2), ({"replicas": 1, "max_replicas": 4}, 1, 4)])
def test_replicas_are_as_many_as_were_asked_for(args, least, most):
    made = application(args)._bound_deployment
    scaled = made._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (least, most) if most > least else scaled is None and made.num_replicas == least
    assert ("num_replicas" in scale(least, most)) == (most == least)


def test_a_bad_setting_is_told_in_one_line():
    done = command(RECO_SERVING_REPLICAS="none")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "RECO_SERVING_REPLICAS" in done.stderr and "Traceback" not in done.stderr
