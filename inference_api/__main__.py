"""python -m inference_api: starts the service, or says what it would do."""

import argparse
import os
import signal
import sys
from pathlib import Path

from inference_api import __version__
from inference_api.config import Settings, settings_or_exit

GUNICORN_CONFIG = Path(__file__).resolve().parent.parent / "gunicorn.conf.py"


def _check(settings: Settings) -> int:
    from inference_api.app import Service
    from inference_api.model import ModelError
    from inference_api.supervisor import require_one_thread

    service = Service(settings)
    try:
        if settings.preload:
            service.load()
            require_one_thread()
        service.prepare()
    except ModelError as exc:
        print(f"inference_api: {exc}", file=sys.stderr)  # noqa: T201 - for whoever runs it by hand
        return 1
    for schema in service.schemas:
        print(f"{schema.path}: {schema.model.name}/{schema.model.version}")  # noqa: T201 - what was asked for
    print("ok")  # noqa: T201 - what was asked for
    return 0


def main() -> None:
    """Parse the command line, check the configuration, and hand over to Gunicorn."""
    variables = (f"  {variable}={default}\n      {meaning}" for variable, default, meaning in Settings.variables())
    parser = argparse.ArgumentParser(
        prog="python -m inference_api",
        description="Serve the models of MODELS over HTTP. Everything is set by environment variables.",
        epilog="\n".join(["environment variables (also read from .env in the working folder):", *variables]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="check the configuration, load and warm up the models, and exit"
    )
    parser.add_argument("--version", action="version", version=__version__)
    check = parser.parse_args().check
    settings = settings_or_exit()
    if check:
        code = _check(settings)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a normal end would wait for threads that the models may have started
    if not os.environ.get("WEB_CONCURRENCY", "").strip():
        os.environ.pop("WEB_CONCURRENCY", None)  # Gunicorn reads it when it is imported, and takes no empty one
    from gunicorn.app.wsgiapp import WSGIApplication

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the models are loaded: no traceback
    sys.argv[1:] = ["--config", str(GUNICORN_CONFIG)]
    WSGIApplication("%(prog)s [OPTIONS]", prog="inference_api").run()


if __name__ == "__main__":
    main()
