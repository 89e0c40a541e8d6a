"""Settings to Gunicorn's names; every check is in inference_api/config.py."""

from pathlib import Path

from inference_api.app import DEFAULT_THREADS
from inference_api.arbiter import Hooks
from inference_api.config import settings_or_exit

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the place for heartbeat files

settings = settings_or_exit()
hooks = Hooks(settings)

wsgi_app = "inference_api.app:get_app()"
bind = f"{settings.host}:{settings.port}" if ":" not in settings.host else f"[{settings.host}]:{settings.port}"
workers = settings.web_concurrency
worker_class = settings.worker_class
threads = settings.threads or DEFAULT_THREADS
preload_app = settings.preload
max_requests = settings.max_requests
max_requests_jitter = settings.max_requests_jitter
keepalive = int(settings.keep_alive) or 1
timeout = settings.timeout
# The arbiter kills at its graceful timeout: it must not do so while a worker still drains.
graceful_timeout = int(settings.drain_seconds + settings.graceful_timeout + 1)

logger_class = "inference_api.logs.Logger"
loglevel = settings.log_level.lower()
accesslog = "-" if settings.access_log else None

# Heartbeat files in memory: a disk that blocks must not cost a worker, and the root may be read-only.
worker_tmp_dir = str(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
control_socket_disable = True

on_starting = hooks.on_starting
pre_fork = hooks.pre_fork
post_fork = hooks.post_fork
post_worker_init = hooks.post_worker_init
worker_exit = hooks.worker_exit
