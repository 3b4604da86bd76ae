# The worker: `docker build -t bus-worker .`, or `docker compose up` with a server beside it.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/bus
WORKDIR /src
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY bus ./bus
RUN /opt/bus/bin/python -m pip install --constraint constraints.txt --upgrade pip \
 && /opt/bus/bin/python -m pip install --constraint constraints.txt \
    --build-constraint constraints.txt .

FROM python:3.13-slim
ENV PATH=/opt/bus/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --system --uid 999 --no-create-home --shell /usr/sbin/nologin bus
COPY --from=build /opt/bus /opt/bus
WORKDIR /app
COPY worker.py ./
COPY handlers ./handlers
USER bus
STOPSIGNAL SIGTERM
CMD ["python", "worker.py"]
