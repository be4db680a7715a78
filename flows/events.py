"""What a flow has to say beyond its exit code: a line in events.jsonl beside the bundles, a message, and an event on Argo.

`python flows/train.py run` needs none of the receivers, and none of them can fail a run.
"""
import sys
from pathlib import Path

from base import SETTINGS
from metaflow import current, namespaced_event_name
from metaflow.exception import MetaflowException
from metaflow.integrations import ArgoEvent
from metaflow.metaflow_config import ARGO_EVENTS_WEBHOOK_URL

from reco import alerts
from reco.alerts import Event
from reco.data.objects import Objects


def place() -> Path | Objects:
    """Where the bundles are, and the log beside them."""
    root = SETTINGS.bundles.root
    return Objects(root, SETTINGS.lake) if "://" in root else SETTINGS.path(root)


def to_argo(event: Event) -> str:
    """Publish an event for the flows that wait for it (`@trigger`); what went wrong, or nothing."""
    about = {k: str(v) for k, v in event.about.items()}
    try: ArgoEvent(namespaced_event_name(event.what)).publish(about | {"key": event.key, "text": event.text}, ignore_errors=False)
    except MetaflowException as e: return str(e)
    return ""


def receivers() -> dict[str, alerts.Send]:
    """Whoever can be reached, by the settings and by Metaflow's own."""
    return alerts.receivers(SETTINGS.alerts) | ({"argo": to_argo} if ARGO_EVENTS_WEBHOOK_URL else {})


def tell(what: str, text: str, about: dict, key: str) -> dict[str, str]:
    """Say what happened, once for a key; receivers that have not got it, and why, which is a warning too. Where the log cannot be written it may be said twice: better than never."""
    trouble = alerts.announce(place(), Event(what, f"{current.flow_name}/{current.run_id}", text, key, about), receivers())
    for name, said in trouble.items(): print(f"warning: {what} has not reached {name}: {said}", file=sys.stderr)
    return trouble
