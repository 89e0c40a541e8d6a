# The service and what it runs on, nothing else: `docker build -t inference-api .`
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim AS build
RUN python -m venv --without-pip /venv
COPY requirements.txt /
# Bytecode is written here, as the root may be read-only later; checked by hash, as a copy may not keep a file's time.
RUN pip --python /venv/bin/python install --disable-pip-version-check --no-cache-dir --no-compile --require-hashes \
        -r /requirements.txt \
    && python -m compileall -q --invalidation-mode checked-hash /venv
COPY gunicorn.conf.py /app/
COPY inference_api /app/inference_api
RUN python -m compileall -q --invalidation-mode checked-hash /app/inference_api

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="Inference API" \
    org.opencontainers.image.description="A small, fast and robust HTTP service in front of a Python model"
# A load balancer needs a few seconds to see on /health that this container is about to end.
ENV PATH=/venv/bin:$PATH \
    DRAIN_SECONDS=5
WORKDIR /app
COPY --from=build /venv /venv
COPY --from=build /app /app
# Numeric, so that Kubernetes can tell that it is not root; the service owns no file and writes none.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, as it never goes through a proxy that the environment may name.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
client = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); \
client.request('GET', '/health'); \
sys.exit(client.getresponse().status != 200)"]
CMD ["python", "-m", "inference_api"]
