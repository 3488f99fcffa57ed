# Sluicegate as a container: not root, nothing to build with, and room for data only in its own folder.
#
#   docker build -t sluicegate .
# and, with `serve: {listen: 0.0.0.0:8470}` in sluicegate.yaml:
#   docker run -p 8470:8470 -v ./sluicegate.yaml:/srv/sluicegate/sluicegate.yaml:ro -v sluicegate:/srv/sluicegate/data sluicegate

FROM python:3.13.9-slim-trixie AS build
RUN pip install --no-cache-dir uv==0.13.9
ENV UV_PROJECT_ENVIRONMENT=/opt/sluicegate UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /build
COPY pyproject.toml uv.lock ./
RUN uv sync --quiet --locked --no-dev --no-install-project
COPY LICENSE README.md ./
COPY gateway gateway
COPY outbox outbox
COPY connectors connectors
COPY dead_letter dead_letter
COPY observability observability
COPY sandbox sandbox
RUN uv sync --quiet --locked --no-dev --no-editable

FROM python:3.13.9-slim-trixie
RUN useradd --system --uid 10470 --home-dir /srv/sluicegate --create-home --shell /usr/sbin/nologin sluicegate \
 && install --directory --owner=sluicegate --mode=0700 /srv/sluicegate/data
COPY --from=build /opt/sluicegate /opt/sluicegate
ENV PATH=/opt/sluicegate/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER sluicegate
WORKDIR /srv/sluicegate
VOLUME /srv/sluicegate/data
EXPOSE 8470
STOPSIGNAL SIGTERM
# Live, not ready: while Postgres is away there is nothing that a restart would mend.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8470/live', timeout=4)"]
ENTRYPOINT ["sluicegate"]
CMD ["serve"]
