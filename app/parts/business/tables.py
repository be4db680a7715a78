"""A table below a chart: what the chart draws, in numbers, and as a file to take along."""
import re

import polars as pl
import streamlit as st


def safe(
    frame: pl.DataFrame,
) -> pl.DataFrame: # text that a spreadsheet would take for a formula begins with '
    "What may be opened in a spreadsheet: names come of shops, and a formula would run there."
    return frame.with_columns(pl.col(pl.String).str.replace(r"^([=+\-@\t\r])", "'$1"))

def csv(frame: pl.DataFrame) -> bytes: return safe(frame).write_csv().encode()

def below(
    frame: pl.DataFrame,  # flat
    name: str,            # of the file, and of the widgets
    label: str = "Table and CSV",
    columns: dict|None = None, # Streamlit's column_config
) -> None:
    "The numbers of a chart, folded away, with a button that downloads them."
    with st.expander(label, icon=":material/table:"):
        st.dataframe(frame, hide_index=True, width="stretch", column_config=columns, alt=f"{name}: {frame.height} rows")
        st.download_button("Download as CSV", csv(frame), f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.csv", "text/csv", key=f"csv {name}", icon=":material/download:", on_click="ignore")
