"""The lab's AWS: one moto server on loopback, in the foreground until SIGTERM.

``python -m lab.aws`` starts it empty; the site playbook creates the hosted zone and its record, as it would in AWS.
What a test against it cannot prove is written in lab/README.md.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ADDRESS = "127.0.0.1"
PORT = 15000
ENDPOINT = f"http://{ADDRESS}:{PORT}"
#: moto accepts any; they must be there for a request to be signed, and must not be anybody's real ones.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "lab",
    "AWS_SECRET_ACCESS_KEY": "lab",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def environment(endpoint: str = ENDPOINT) -> dict[str, str]:
    """Environment variables for a client of the lab's AWS, which also keep the operator's own AWS set-up out of it."""
    return {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def loopback(text: str) -> str:
    """An argument that must be a loopback address: an emulated AWS accepts everything from everybody."""
    try:
        if ipaddress.ip_address(text).is_loopback:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a loopback address")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 then, 1 when the port is taken."""
    parser = argparse.ArgumentParser(prog="python -m lab.aws", description="The lab's AWS: a moto server.")
    parser.add_argument("--address", type=loopback, default=ADDRESS)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--trail", type=Path, help="file that keeps the requests that change something")
    arguments = parser.parse_args(argv)

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(environment(f"http://{arguments.address}:{arguments.port}"))
    os.environ["MOTO_PORT"] = str(arguments.port)

    # Imported here: moto takes a second, and `environment` is wanted by programs that do not serve.
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    from lab.aws_eks import EksOverlay
    from lab.aws_trail import Trail

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    try:
        application: Any = EksOverlay(DomainDispatcherApplication(create_backend_app))
        if arguments.trail:
            application = Trail(application, arguments.trail)
        server = make_server(arguments.address, arguments.port, application, threaded=True)
    except (OSError, SystemExit) as error:
        print(f"error: {arguments.address}:{arguments.port} cannot be bound: {error}", file=sys.stderr)
        return 1

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    print(f"moto serves AWS on http://{arguments.address}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
