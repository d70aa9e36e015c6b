"""`armm demo`: a page in the browser that draws, answers and repaints."""

from __future__ import annotations

import argparse
import threading

from armm.cli.common import add_device_arguments, add_parser, resolve_device, resolve_dtype, whole

DESCRIPTION = """\
Opens a page for the browser with three tabs: Generate (pictures from sentences, token by token, with every decoder and
accelerator that fits), Understand (captions, answers, and where each word comes from), Inpaint (paint over what shall
change). It is served from this machine, loads nothing from elsewhere, and needs `pip install "armm[demo]"`."""

EXAMPLES = """\
  armm demo
  armm demo --port 8000 --weights runs/scenes-unified-64/export
  armm demo --host 0.0.0.0              (reachable from other machines of the network)
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "demo", "a page in the browser to try the shipped model", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=7860, metavar="N", help="port; 0 takes a free one (default: 7860)"
    )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="a folder of a unified model, as training exports it (default: the shipped model)",
    )
    add_device_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from armm.serving.requirements import require_gradio, usable_port

    require_gradio()
    port = usable_port(args.host, args.port)
    device = resolve_device(args.device)

    from armm.serving.demo import serve
    from armm.serving.studio import Studio

    studio = Studio(args.weights, device, resolve_dtype(args.dtype, device))
    with serve(studio, args.host, port) as address:
        print(f"armm demo: {address} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0
