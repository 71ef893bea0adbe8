"""The two metrics APIs that an autoscaler asks: the real metrics-server, and one for what the relay's pods say themselves."""

import sys
from pathlib import Path

import network
from cluster import outside_service
from commands import until

NAMESPACE = "kube-system"
SERVER_PORT, CUSTOM_PORT = 4443, 4444


def start(cluster):
    """Starts both as processes beside the API server, and waits until it finds them."""
    pki = cluster.authority.folder
    config = cluster.kubeconfig
    cluster.servers.start(
        "metrics-server", cluster.tools.program("metrics-server"),
        f"--kubeconfig={config}", f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}",
        f"--cert-dir={cluster.folder}/metrics-server", f"--secure-port={SERVER_PORT}", "--kubelet-insecure-tls",
        "--kubelet-preferred-address-types=InternalIP", "--kubelet-request-timeout=5s", "--metric-resolution=10s",
    )  # fmt: skip
    cluster.authority.issue("custom-metrics", "/CN=custom-metrics", f"IP:{network.GATEWAY}")
    cluster.servers.start(
        "custom-metrics", sys.executable, Path(__file__).with_name("custom_metrics.py"), pki, network.GATEWAY, CUSTOM_PORT
    )
    for name, group, version, port in (
        ("metrics-server", "metrics.k8s.io", "v1beta1", SERVER_PORT),
        ("custom-metrics", "custom.metrics.k8s.io", "v1beta2", CUSTOM_PORT),
    ):
        cluster.apply(*outside_service(NAMESPACE, name, {"https": (port, "TCP")}), api_service(name, group, version, port))
        api = f"{version}.{group}"
        cluster.kubectl("wait", "--for=condition=Available", f"apiservice/{api}", "--timeout=120s", timeout=150)
    until("there are figures of pods", lambda: cluster.kubectl("top", "pods", "--all-namespaces", "--no-headers"), timeout=120)


def api_service(name, group, version, port):
    return {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": f"{version}.{group}"},
        "spec": {
            "group": group,
            "version": version,
            "service": {"namespace": NAMESPACE, "name": name, "port": port},
            "insecureSkipTLSVerify": True,
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
        },
    }
