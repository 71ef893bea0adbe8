"""A custom-metrics API of a hundred lines: whoever asks for a metric of pods is told what their own /metrics say at that moment.

custom_metrics.py FOLDER_WITH_KEYS ADDRESS PORT
"""

import json
import ssl
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from urllib.parse import parse_qs, unquote, urlencode, urlparse

GROUP_VERSION = "custom.metrics.k8s.io/v1beta2"
# Where the chart's pods tell their metrics.
ADMIN_PORT = 9090
# The states that a metric may be split into are added up.
METRICS = ["midspan_edge_streams"]
PATIENCE = 5


class Api(BaseHTTPRequestHandler):
    """The part of the API that an autoscaler uses."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlparse(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            if url.path.rstrip("/") == f"/apis/{GROUP_VERSION}":
                self.answer(200, resources())
            elif len(parts) == 8 and parts[3] == "namespaces" and parts[5:7] == ["pods", "*"] and parts[7] in METRICS:
                selector = parse_qs(url.query).get("labelSelector", [""])[0]
                self.answer(200, self.server.values(parts[4], selector, parts[7]))
            else:
                self.answer(404, failure(404, f"no such thing: {self.path}"))
        except (OSError, ValueError) as error:
            print(f"{self.path}: {error}", flush=True)
            self.answer(503, failure(503, str(error)))

    def answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Only errors are told."""


class Server(ThreadingHTTPServer):
    """Asks the API server which pods there are, and the pods how they are."""

    daemon_threads = True

    def server_bind(self):
        # Not HTTPServer's, which asks a name server for the name of its address, and there is none.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address

    def __init__(self, address, keys: Path):
        super().__init__(address, Api)
        # Only the API server's front proxy has a certificate of this authority and asks here.
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=keys / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(keys / "custom-metrics.crt", keys / "custom-metrics.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.client = ssl.create_default_context(cafile=keys / "ca.crt")
        self.client.load_cert_chain(keys / "admin.crt", keys / "admin.key")
        self.api_server = f"https://{address[0]}:6443"

    def values(self, namespace, selector, metric):
        query = urlencode({"labelSelector": selector})
        url = f"{self.api_server}/api/v1/namespaces/{namespace}/pods?{query}"
        with urllib.request.urlopen(url, timeout=PATIENCE, context=self.client) as answer:
            pods = json.load(answer)["items"]
        running = [pod for pod in pods if pod["status"].get("podIP") and pod["status"]["phase"] == "Running"]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        items = []
        for pod in running:
            try:
                value = total(pod["status"]["podIP"], metric)
            except OSError as error:
                # It starts or ends; an autoscaler knows what to do about a pod without a figure.
                print(f"{pod['metadata']['name']}: {error}", flush=True)
                continue
            described = {"kind": "Pod", "namespace": namespace, "name": pod["metadata"]["name"], "apiVersion": "v1"}
            items.append({
                "describedObject": described, "metric": {"name": metric}, "timestamp": now, "value": str(int(value)),
            })  # fmt: skip
        return {"kind": "MetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": items}


def failure(code, message):
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}


def total(address, metric):
    with urllib.request.urlopen(f"http://{address}:{ADMIN_PORT}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{metric} ", f"{metric}{{")))


def resources():
    listed = [
        {"name": f"pods/{metric}", "singularName": "", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}
        for metric in METRICS
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": listed}


if __name__ == "__main__":
    folder, host, port = sys.argv[1:]
    Server((host, int(port)), Path(folder)).serve_forever()
