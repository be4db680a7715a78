"""The Streamlit app, started by `python -m app.dashboard`. Its pages are in app_pages/."""
import os
import sys
import threading
from importlib import import_module
from pathlib import Path

import streamlit as st
from streamlit import runtime

from reco.settings import SettingsError, load_settings

PAGES = [("shop", "Shop", "storefront"), ("why", "Why", "psychology_alt"), ("quality", "Quality", "verified"), ("business", "Business", "trending_up"),
         ("monitoring", "Monitoring", "monitor_heart"), ("data", "Data", "database")] # file in app_pages/, title, icon; the first is where one arrives
HEAVY = "reco.bundle", "reco.monitoring.days" # two seconds, which pages import when they need them
WAIT_S = 2 # after the first page was asked for: it comes first

@st.cache_resource(show_spinner=False)
def warmed() -> None: # once a server
    "Bring what is heavy while the first page is being read."
    timer = threading.Timer(WAIT_S, lambda: [import_module(m) for m in HEAVY])
    timer.daemon = True
    timer.start()

def show() -> None:
    "The navigation and the page that it points to."
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path: sys.path.insert(0, root) # the pages import `app`; `streamlit run` puts only this file's folder there
    st.set_page_config(page_title="reco", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
    st.html("<style>[data-testid=stMainBlockContainer] {padding-top:4.5rem}</style>") # Streamlit leaves twice as much below its bar
    st.navigation([st.Page(f"app_pages/{name}.py", title=title, icon=f":material/{icon}:", default=not n) for n, (name, title, icon) in enumerate(PAGES)], position="top").run()
    warmed()

# loopback, no browser opened, nothing sent anywhere; a variable that is set already wins
STREAMLIT = {"STREAMLIT_SERVER_ADDRESS": "127.0.0.1", "STREAMLIT_SERVER_HEADLESS": "true",
             "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false", "STREAMLIT_CLIENT_TOOLBAR_MODE": "minimal"}

def launch() -> int: # exit code, when Streamlit could not be started
    "Become Streamlit, on the port of the settings."
    try: port = load_settings().app.port
    except SettingsError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    os.execve(sys.executable, [sys.executable, "-m", "streamlit", "run", __file__, "--server.port", str(port)], STREAMLIT | os.environ)

if __name__ == "__main__":
    if runtime.exists(): show()
    else: sys.exit(launch())
