"""A page in the browser: train and watch, try a sound, look at the data, compare runs.

python app.py                            on http://127.0.0.1:7860, for this machine only
python app.py DATA_DIR=gtzan             with other settings than config.py's to start from
python app.py --host 0.0.0.0             for others, too: with a password, which is printed
python app.py --host 0.0.0.0 --auth ann:secret

It needs requirements-app.txt. Training is a process of its own: closing the page or ending this
script does not stop it. The page shows the runs below runs/, those from a terminal too.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from stemgenre import cli
from stemgenre.errors import UserError

USER = "stemgenre"


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings to start from")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="asks every visitor for it")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_intermixed_args()
    settings = cli.parse_settings(args.settings)
    if args.auth is not None and not all(args.auth.partition(":")):
        raise UserError("--auth needs USER:PASSWORD")

    uploads = Path(tempfile.mkdtemp(prefix="stemgenre-"))
    # Read when gradio is imported; from here on nothing is counted or reported anywhere.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": str(uploads),
    }
    try:
        run_page(args, settings, uploads)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


def run_page(args, settings, uploads) -> None:
    """Serves the page until Ctrl-C."""
    try:
        import gradio  # noqa: F401  seconds, so after the arguments
    except ModuleNotFoundError:
        raise UserError("app.py needs Gradio: pip install -r requirements-app.txt") from None
    from stemgenre.app.page import Page
    from stemgenre.app.runs import Runs
    from stemgenre.app.server import LOCAL_NAMES, make_app, open_socket, serve

    is_local = args.host in LOCAL_NAMES
    password = args.auth or (None if is_local else f"{USER}:{secrets.token_urlsafe(12)}")
    runs = Runs(args.runs, settings.paths.output(""))
    page = Page(args.settings, settings, runs, exposed=not is_local)
    app = make_app(
        page, hosts=LOCAL_NAMES if is_local else None, password=password, uploads=uploads
    )
    with open_socket(args.host, args.port) as listening:
        host = f"[{args.host}]" if ":" in args.host else args.host
        cli.log.info(
            "open http://%s:%d  (Ctrl-C ends the page, no training)",
            host,
            listening.getsockname()[1],
        )
        if not args.auth and password:
            user, _, word = password.partition(":")
            cli.log.info("user %s, password %s", user, word)
        serve(app, listening)


if __name__ == "__main__":
    cli.run_script(main)
