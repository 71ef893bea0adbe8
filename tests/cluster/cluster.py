"""A real cluster on this machine: etcd, API server, controller manager, scheduler, kube-proxy, CoreDNS, two nodes."""

import contextlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import network
import node
from commands import Failed, run, until
from pki import Authority
from servers import Servers, is_alive, started

CLUSTERS = Path("/var/tmp/midspan-cluster")
SERVER = f"https://{network.GATEWAY}:6443"
NODES = 2


class Cluster:
    """One cluster, by its name; everything that it makes bears that name or lies in its folder."""

    def __init__(self, name, tools):
        self.name, self.tools = name, tools
        self.network = f"midspan-{name}"
        self.folder = CLUSTERS / name
        self.servers = Servers(self.folder, self.network)
        self.nodes = [node.Node(self.network, self.folder, index) for index in range(NODES)]
        self.authority = Authority(self.folder / "pki")
        self.kubeconfig = self.folder / "pki/admin.kubeconfig"

    def within(self, *words, **options):
        """Runs a program in the cluster's network."""
        return run(*network.within(self.network), *words, **options)

    def kubectl(self, *words, **options):
        # Another cluster with the same address may have had other resources.
        cache = f"--cache-dir={self.folder}/kubectl"
        return self.within(self.tools.program("kubectl"), "--kubeconfig", self.kubeconfig, cache, *words, **options)

    def get(self, *words):
        """What `kubectl get` says, as JSON."""
        return json.loads(self.kubectl("get", *words, "--output", "json"))

    def apply(self, *objects, **options):
        everything = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        return self.kubectl("apply", "--filename", "-", stdin=json.dumps(everything), **options)

    def up(self, images):
        """From nothing to two nodes that are ready; `images` are tars of OCI layouts."""
        self.folder.mkdir(parents=True, mode=0o700)
        (self.folder / "owner").write_text(f"{os.getpid()} {started(os.getpid())}")
        network.make(self.network, NODES)
        self.authority.make()
        with ThreadPoolExecutor() as pool:
            containers = [pool.submit(one.start_containerd, self.servers, self._titles(one)) for one in self.nodes]
            configs = {
                name: pool.submit(self.authority.kubeconfig, name, subject, SERVER)
                for name, subject in {
                    "admin": "/O=system:masters/CN=admin",
                    "controller-manager": "/CN=system:kube-controller-manager",
                    "scheduler": "/CN=system:kube-scheduler",
                    "proxy": "/CN=system:kube-proxy",
                    "dns": "/O=system:masters/CN=dns",
                    **{one.name: f"/O=system:nodes/CN=system:node:{one.name}" for one in self.nodes},
                }.items()
            }
            names = "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost"
            addresses = f"IP:{network.GATEWAY},IP:{network.API_SERVICE},IP:127.0.0.1"
            serving = pool.submit(self.authority.issue, "api-server", "/CN=kube-apiserver", f"{names},{addresses}")
            front = pool.submit(self.authority.issue, "front-proxy", "/CN=front-proxy")
            self._start_etcd()
            serving.result()
            front.result()
            self.start_api_server()
            configs = {name: config.result() for name, config in configs.items()}
            for container in containers:
                container.result()
            imports = [pool.submit(one.import_images, images) for one in self.nodes]
            self.wait_for_api_server()
            self._start_controllers(configs)
            for done in imports:
                done.result()
        for one in self.nodes:
            kubelet = self.tools.program("kubelet")
            one.start_kubelet(self.servers, self._titles(one), kubelet, configs[one.name], self.authority.certificate)
        self._start_dns(configs["dns"])
        until("both nodes are ready", self._nodes_ready, timeout=120)

    def down(self):
        """Ends and removes everything, also what an earlier run has left; what cannot be removed is an error."""
        if not self.folder.is_dir() and not Path(f"/run/netns/{self.network}").exists():
            return
        # Kubelets first: they start again what is ended below them.
        self.servers.stop(*(self._titles(one)["kubelet"] for one in self.nodes))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda one: one.remove_containers(), self.nodes))
        self.servers.stop()
        self._end_strays()
        for one in self.nodes:
            one.remove_cgroups()
        network.remove(self.network)
        if self.folder.is_dir():
            node.forget(self.folder)
        with contextlib.suppress(OSError):
            CLUSTERS.rmdir()

    def left_behind(self):
        """Names of everything of this cluster that exists."""
        found = [f"process {pid}" for pid in self._strays()]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [line.split()[4] for line in mounts if f"{self.folder}/" in line]
        found += [str(path) for one in self.nodes for path in one.cgroup_folders()]
        found += [str(path) for path in node.elsewhere(self.folder)]
        paths = (self.folder, Path(f"/run/netns/{self.network}"))
        return found + [str(path) for path in paths if path.exists()]

    def start_api_server(self):
        pki = self.authority.folder
        self.servers.start(
            "api-server", self.tools.program("kube-apiserver"),
            "--etcd-servers=http://127.0.0.1:2379",
            "--bind-address=0.0.0.0", "--secure-port=6443", f"--advertise-address={network.GATEWAY}",
            f"--service-cluster-ip-range={network.SERVICE_RANGE}",
            f"--tls-cert-file={pki}/api-server.crt", f"--tls-private-key-file={pki}/api-server.key",
            f"--client-ca-file={pki}/ca.crt",
            f"--kubelet-client-certificate={pki}/admin.crt", f"--kubelet-client-key={pki}/admin.key",
            "--kubelet-preferred-address-types=InternalIP",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki}/tokens.pub", f"--service-account-signing-key-file={pki}/tokens.key",
            f"--requestheader-client-ca-file={pki}/ca.crt", "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki}/front-proxy.crt", f"--proxy-client-key-file={pki}/front-proxy.key",
            "--enable-aggregator-routing=true",
        )  # fmt: skip

    def wait_for_api_server(self):
        until("the API server is ready", lambda: self.kubectl("get", "--raw", "/readyz", timeout=10), timeout=120)

    def _titles(self, one):
        return {"containerd": f"containerd-{one.index}", "kubelet": f"kubelet-{one.index}"}

    def _start_etcd(self):
        self.servers.start("etcd", "etcd", "--data-dir", self.folder / "etcd", "--unsafe-no-fsync")

    def _start_controllers(self, configs):
        pki = self.authority.folder
        self.servers.start(
            "controller-manager", self.tools.program("kube-controller-manager"),
            "--kubeconfig", configs["controller-manager"], "--leader-elect=false", "--bind-address=127.0.0.1",
            "--use-service-account-credentials=true",
            f"--root-ca-file={pki}/ca.crt", f"--service-account-private-key-file={pki}/tokens.key",
            # So that an autoscaler can be seen to act within a test.
            "--horizontal-pod-autoscaler-sync-period=2s", "--horizontal-pod-autoscaler-downscale-stabilization=5s",
            "--horizontal-pod-autoscaler-cpu-initialization-period=10s",
            "--horizontal-pod-autoscaler-initial-readiness-delay=5s",
            # By default 50 seconds. An API server that was away for longer has no sign of life of any node when it is back, and
            # if this controller looks before the kubelets have spoken, all pods leave all Services for some seconds.
            "--node-monitor-grace-period=5m",
        )  # fmt: skip
        self.servers.start(
            "scheduler", self.tools.program("kube-scheduler"),
            "--kubeconfig", configs["scheduler"], "--leader-elect=false", "--bind-address=127.0.0.1",
        )  # fmt: skip
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(configs["proxy"])},
            "clusterCIDR": network.POD_RANGE,
            "hostnameOverride": self.nodes[0].name,
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        (self.folder / "proxy.json").write_text(json.dumps(config))
        self.servers.start("proxy", self.tools.program("kube-proxy"), "--config", self.folder / "proxy.json")

    def _start_dns(self, kubeconfig):
        (self.folder / "Corefile").write_text(f""".:53 {{
    bind {network.GATEWAY}
    errors
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
    }}
}}
""")
        self.servers.start("dns", self.tools.program("coredns"), "-conf", self.folder / "Corefile")
        ports = {"dns": (53, "UDP"), "dns-tcp": (53, "TCP")}
        self.apply(*outside_service("kube-system", "kube-dns", ports, cluster_ip=network.DNS_SERVICE))

    def _nodes_ready(self):
        for title, said in self.servers.dead():
            # There is no use in waiting any longer; no Failed, since that would be tried again.
            raise RuntimeError(f"{title} has ended: {said}")
        items = self.get("nodes")["items"]
        ready = [
            one for one in items for condition in one["status"].get("conditions", [])
            if condition["type"] == "Ready" and condition["status"] == "True"
        ]  # fmt: skip
        return len(ready) == NODES

    def _strays(self):
        """Processes, such as the shims of containerd, whose command line names this cluster's folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if f"{self.folder}/" in (entry / "cmdline").read_text(errors="replace"):
                        found.append(int(entry.name))
        return found

    def _end_strays(self):
        until("the last processes have ended", lambda: not self._kill_strays(), timeout=20)

    def _kill_strays(self):
        found = self._strays()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found


def outside_service(namespace, name, ports, cluster_ip=None):
    """A Service in front of a process that is no pod, but listens on the address of the first node."""
    meta = {"namespace": namespace, "name": name}
    listed = [{"name": key, "port": port, "protocol": protocol} for key, (port, protocol) in ports.items()]
    spec = {"ports": listed} | ({"clusterIP": cluster_ip} if cluster_ip else {})
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": meta | {"labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [network.GATEWAY], "conditions": {"ready": True}}],
            "ports": listed,
        },
    ]


def take_down_abandoned(tools):
    """Takes down the clusters of runs that were killed before they could."""
    for owner in CLUSTERS.glob("*/owner"):
        pid, start = owner.read_text().split()
        if not is_alive(int(pid), start) and not (owner.parent / "kept").exists():
            print(f"taking down {owner.parent.name}, whose run was killed", flush=True)
            Cluster(owner.parent.name, tools).down()


def free_name():
    """A name that no other cluster of this machine has."""
    return f"{os.getpid()}-{int(time.time()) % 100000}"


__all__ = ["Cluster", "Failed", "free_name", "outside_service", "take_down_abandoned"]
