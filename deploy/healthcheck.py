"""Tell by the exit code whether the server of this container would answer a request now.

It asks by the server's unix socket, so that it is right whatever the port, the certificates and the keys are, and it
imports nothing of the server, which takes a second of processor time.
"""

import http.client
import os
import socket
import sys

PATIENCE_SECONDS = 4.0

with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(PATIENCE_SECONDS)
    try:
        connection.connect(os.path.join(os.environ["QUIVER_SOCKET_DIR"], "rest.sock"))  # noqa: PTH118  pathlib is slow to import
        client = http.client.HTTPConnection("localhost")
        client.sock = connection
        client.request("GET", sys.argv[1] if len(sys.argv) > 1 else "/health/ready")
        reply = client.getresponse()
        sys.exit(0 if reply.status == http.HTTPStatus.OK else f"{reply.status}: {reply.read(1000).decode()}")
    except (KeyError, OSError) as error:
        sys.exit(f"no answer: {error!r}")
