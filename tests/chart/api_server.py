"""A stand-in for a Kubernetes API server: as much as `helm template --dry-run=server` needs to look up Secrets."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


# What the chart's manifests consist of: Helm looks up each kind before it renders for a server.
KINDS = {
    "v1": ["ConfigMap", "Pod", "Secret", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
}


def plural(kind):
    return kind.lower().removesuffix("y") + "ies" if kind.endswith("y") else kind.lower() + ("es" if kind.endswith("s") else "s")


class ApiServer:
    """Serves `secrets`, a dict of name -> data in base64, in every namespace."""

    def __init__(self):
        self.secrets = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer = server.answer(self.path.split("?")[0])
                body = json.dumps(answer or {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}).encode()
                self.send_response(200 if answer else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path):
        if path == "/version":
            return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = [version.split("/") for version in KINDS if "/" in version]
            versions = [{"groupVersion": f"{group}/{version}", "version": version} for group, version in groups]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{"name": group, "versions": [entry], "preferredVersion": entry} for (group, _), entry in zip(groups, versions)]}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version in KINDS:
            verbs = ["get", "list", "create", "patch"]
            resources = [{"name": plural(kind), "kind": kind, "namespaced": True, "verbs": verbs} for kind in KINDS[version]]
            return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        if path.endswith("/serviceaccounts"):
            return {"kind": "ServiceAccountList", "apiVersion": "v1", "metadata": {}, "items": []}
        name = path.rsplit("/", 1)[-1]
        if "/secrets/" in path and name in self.secrets:
            return {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": name}, "data": self.secrets[name]}
        return None

    def kubeconfig(self):
        """The text of a kubeconfig that leads here."""
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.http.server_port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "c"}}
        return json.dumps({"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context], "users": [{"name": "c", "user": {}}], "current-context": "c"})
