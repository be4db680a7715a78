"""Runs the walkthroughs of `nbs/9x` on real files and keeps what came out in the notebooks.

    python docs/make_walkthroughs.py retailrocket=FOLDER online_retail=FOLDER [--only 94_one_shopper ...]

Each notebook says in its parameters which format it is written about. One whose files are not given stays as it is. `nbdev-test` runs them
all without files, on a small simulated shop, and keeps nothing.
"""

import argparse
import ast
import sys
import tempfile
from pathlib import Path

import nbformat

from reco.data.sources import FILES
from reco.reports import ReportError, executed, read_notebook

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
WALKTHROUGHS = "9[0-9]_*.ipynb"


def folder_of(text: str) -> tuple[str, Path]:
    """`source=FOLDER` of the command line; raises `argparse.ArgumentTypeError`."""
    source, _, folder = text.partition("=")
    if source not in FILES: raise argparse.ArgumentTypeError(f"{source!r} is no format of files; known: {', '.join(FILES)}")
    if not Path(folder).is_dir(): raise argparse.ArgumentTypeError(f"{source}: no folder {folder!r}")
    return source, Path(folder).absolute()


def parameters(nb: nbformat.NotebookNode) -> dict[str, object]:
    """The values in the notebook's cell of parameters."""
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    return {t.id: ast.literal_eval(x.value) for x in ast.parse(cell.source).body if isinstance(x, ast.Assign) for t in x.targets if isinstance(t, ast.Name)}


def with_outputs(nb: nbformat.NotebookNode, ran: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is written, with what came out when it ran; raises `ValueError` for an output that names a temporary folder."""
    found = {c.id: c.get("outputs", []) for c in ran.cells}
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in found[cell.id] if o.get("name") != "stderr"]
    if tempfile.gettempdir() in nbformat.writes(nb): raise ValueError("an output names a folder of this machine")
    return nb


def main(argv: list[str] | None = None) -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=folder_of, metavar="SOURCE=FOLDER", help="where files of a format are")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these notebooks alone")
    args = parser.parse_args(argv)
    there, names = dict(args.files), {p.stem: p for p in sorted(NOTEBOOKS.glob(WALKTHROUGHS))}
    if unknown := set(args.only) - names.keys(): sys.exit(f"no walkthrough {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for name, path in names.items():
        if args.only and name not in args.only: continue
        nb = read_notebook(path.read_text("utf-8"), name)
        source = str(parameters(nb)["source"])
        if source not in there:
            print(f"{name}: left as it is, {source}=FOLDER is not given")
            continue
        try:
            with tempfile.TemporaryDirectory() as cwd: ran = executed(nb, {"source": source, "path": str(there[source])}, Path(cwd))
        except ReportError as e: sys.exit(f"{name}: {e}")
        part = path.with_suffix(".tmp")
        nbformat.write(with_outputs(nb, ran), part)
        part.replace(path)
        print(f"{name}: ran on {source}")


if __name__ == "__main__": main()
