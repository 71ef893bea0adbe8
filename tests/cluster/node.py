"""A node: containerd and kubelet with folders, addresses and control groups of their own."""

import contextlib
import json
import shutil
from pathlib import Path

import network
from commands import Failed, run, until

CGROUPS = Path("/sys/fs/cgroup")
LOG_LINKS = Path("/var/log/containers")
CNI_RESULTS = Path("/var/lib/cni/results")
# Every kubelet makes this one, whatever its own folder is, and leaves it.
PLUGINS_SOCKET = Path("/var/lib/kubelet/device-plugins/kubelet.sock")
# Where shims of containerd listen; those that were killed leave their sockets.
SHIM_SOCKETS = Path("/run/containerd/s")
# Folders in which nothing of anybody else's is, when they are empty.
SHARED = [
    LOG_LINKS, CNI_RESULTS, CNI_RESULTS.parent, PLUGINS_SOCKET.parent, PLUGINS_SOCKET.parent.parent,
    SHIM_SOCKETS, SHIM_SOCKETS.parent,
]  # fmt: skip
POD_SHARES = 16 * 1024
PAUSE_IMAGE = "docker.io/library/pause:test"


class Node:
    """One node of a cluster, by its index; zones are named a, b and so on."""

    def __init__(self, cluster_name, folder: Path, index):
        self.index = index
        self.name = f"node-{index}"
        self.zone = "abcdefgh"[index]
        self.address = network.node_address(index)
        self.folder = folder / self.name
        self.socket = self.folder / "containerd.sock"
        self.cgroup = f"{cluster_name}-{self.name}"

    def ctr(self, *words, timeout=60, check=True):
        return run("ctr", "--address", self.socket, "--namespace", "k8s.io", *words, timeout=timeout, check=check)

    def start_containerd(self, servers, titles):
        """Starts containerd and waits until it answers."""
        self.folder.mkdir(parents=True)
        network_folder = self.folder / "cni"
        network_folder.mkdir()
        # Each node has its own list of addresses that are taken.
        plugins = network.cni(self.index)
        plugins["plugins"][0]["ipam"]["dataDir"] = str(self.folder / "addresses")
        (network_folder / "pods.conflist").write_text(json.dumps(plugins))
        (self.folder / "containerd.toml").write_text(self._containerd_config(network_folder))
        servers.start(titles["containerd"], "containerd", "--config", self.folder / "containerd.toml")
        until(f"containerd of {self.name} answers", lambda: self.ctr("version", timeout=5), timeout=60)

    def import_images(self, images):
        for image in images:
            self.ctr("image", "import", image, timeout=180)

    def start_kubelet(self, servers, titles, kubelet, kubeconfig, authority):
        self._make_cgroup()
        (self.folder / "resolv.conf").write_text("")
        (self.folder / "kubelet.json").write_text(json.dumps(self._kubelet_config(authority)))
        servers.start(
            titles["kubelet"], kubelet, "--config", self.folder / "kubelet.json", "--kubeconfig", kubeconfig,
            "--hostname-override", self.name, "--node-ip", self.address, "--root-dir", self.folder / "kubelet",
            "--cert-dir", self.folder / "kubelet-pki", "--v=1",
            f"--node-labels=topology.kubernetes.io/zone={self.zone}",
        )  # fmt: skip

    def remove_containers(self):
        """Ends every task of this node's containerd, if that still answers."""
        if not self.socket.exists():
            return
        try:
            for task in self.ctr("task", "list", "--quiet", timeout=20).split():
                self.ctr("task", "delete", "--force", task, timeout=20, check=False)
            for container in self.ctr("container", "list", "--quiet", timeout=20).split():
                self.ctr("container", "delete", container, timeout=20, check=False)
        except Failed as failure:
            # What is left is found by its command line, its mounts and its control groups.
            print(f"{self.name}: {failure}")

    def remove_cgroups(self):
        """Removes the control groups of this node, which are empty once its containers have ended."""
        for top in self.cgroup_folders():
            folders = sorted((path for path in top.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
            for folder in [*folders, top]:
                until(f"{folder} is empty", lambda folder=folder: _remove_folder(folder), timeout=20)

    def cgroup_folders(self):
        found = [CGROUPS / self.cgroup, *CGROUPS.glob(f"*/{self.cgroup}")]
        return [path for path in found if path.is_dir()]

    def _make_cgroup(self):
        if (CGROUPS / "cgroup.controllers").exists():
            (CGROUPS / self.cgroup).mkdir()
            return
        for controller in CGROUPS.iterdir():
            if controller.is_symlink() or not controller.is_dir() or controller.name == "unified":
                continue
            folder = controller / self.cgroup
            folder.mkdir(exist_ok=True)
            # A new group of this kind has no processors, and takes no process until it does.
            for setting in ("cpuset.cpus", "cpuset.mems"):
                if (controller / setting).exists():
                    (folder / setting).write_text((controller / setting).read_text())
            # A group weighs as much as one process outside of it, unless told; all pods of a node are below this one.
            if (folder / "cpu.shares").exists():
                (folder / "cpu.shares").write_text(str(POD_SHARES))

    def _kubelet_config(self, authority):
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "healthzBindAddress": self.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(authority)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": ["none"],
            # The machine is shared: how full its disk is, is not the cluster's business.
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "podLogsDir": str(self.folder / "logs"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "clusterDomain": "cluster.local",
            "clusterDNS": [network.DNS_SERVICE],
            "resolvConf": str(self.folder / "resolv.conf"),
            "syncFrequency": "10s",
            "nodeStatusUpdateFrequency": "4s",
        }

    def _containerd_config(self, network_folder):
        return f"""version = 2
root = "{self.folder}/containerd"
state = "{self.folder}/containerd-state"
[grpc]
address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{self.folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
disable_apparmor = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{network_folder}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{self.folder}/runc"
"""


def _remove_folder(folder):
    if folder.is_dir():
        folder.rmdir()
    return True


def elsewhere(folder: Path):
    """Files that kubelets and CNI keep in places which nobody can choose, and that are about this folder's containers."""
    found = [path for path in LOG_LINKS.glob("*.log") if path.is_symlink() and path.readlink().is_relative_to(folder)]
    found += [path for path in CNI_RESULTS.glob("*") if f"{folder}/" in path.read_text(errors="replace")]
    if PLUGINS_SOCKET.is_socket() and not others_run("kubelet"):
        found.append(PLUGINS_SOCKET)
    # The kernel keeps 15 characters of a process' name.
    if not others_run("containerd-shim"):
        found += [path for path in SHIM_SOCKETS.glob("*") if path.is_socket()]
    return found


def others_run(program):
    """Whether a process of this name is there."""
    return any(_name(path) == program for path in Path("/proc").glob("[0-9]*/comm"))


def _name(path):
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return None


def forget(folder: Path):
    """Unmounts what lies below the folder, the deepest first, and removes it and what is elsewhere because of it."""
    for path in elsewhere(folder):
        path.unlink(missing_ok=True)
    for place in SHARED:
        with contextlib.suppress(OSError):
            place.rmdir()
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((mount for mount in mounts if Path(mount).is_relative_to(folder)), key=len, reverse=True):
        run("umount", "--lazy", point)
    shutil.rmtree(folder)
