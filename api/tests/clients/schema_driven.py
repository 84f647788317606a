#!/usr/bin/env python3
"""Sends a running machine requests generated from its own document.

    schema_driven.py SOCKET [option of `schemathesis run` ...]

Needs schemathesis (from PyPI) in the PATH. Requests are generated from resources/openapi.yaml,
valid ones and others; a server error, an answer that the document does not have, or an invalid
request that is accepted fails the run. Afterwards the machine must still run, in the same state,
and its monitor be at most a megabyte larger.

Starting and stopping are left out. Requests name the files of log and metrics, so the server must
run as a user without write permission elsewhere.
"""

import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import threading

DOCUMENT = pathlib.Path(__file__).parents[3] / "resources" / "openapi.yaml"

# The document cannot express some rules: identifiers in path and body must agree, taps must
# differ, the model must suit the architecture. So a valid request may be refused.
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
]


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def relay(path):
    """Passes connections on a local TCP port to the socket, for clients that speak TCP only."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            client, _ = listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(path)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def ask(path, target):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        request = f"GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b""
        while data := connection.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), answer
    return body.decode()


def resident_kib(path):
    """Memory of the process behind the socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, _, _ = struct.unpack("3i", credentials)
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


def main():
    path, *options = sys.argv[1:]
    state = json.loads(ask(path, "/"))["state"]
    before = resident_kib(path)
    port = relay(path)
    command = ["schemathesis", "run", str(DOCUMENT), "--url", f"http://127.0.0.1:{port}"]
    command += ["--checks", ",".join(CHECKS), "--continue-on-failure", "--no-shrink"]
    command += ["--exclude-operation-id", "putAction", "--exclude-operation-id", "patchVm"]
    status = subprocess.run(command + options, check=False, env=os.environ).returncode
    after = resident_kib(path)
    responses = re.findall(r'api_responses_total\{code="(\d+)"\} (\d+)', ask(path, "/metrics"))
    print("responses:", ", ".join(f"{count} x {code}" for code, count in responses))
    print(f"resident memory: {before} KiB before, {after} KiB after")
    assert json.loads(ask(path, "/"))["state"] == state, "the machine's state has changed"
    assert after - before < 1024, "the server has grown"
    assert not any(code.startswith("5") for code, _ in responses if code not in ("501", "505"))
    return status


if __name__ == "__main__":
    sys.exit(main())
