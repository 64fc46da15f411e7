# Images of `trocar serve`: target `cpu` (default), and `cuda` for NVIDIA GPUs.
#
# Not yet built by a Docker engine: none was at hand. `python deploy/rehearse_image.py` executes the steps of
# the target `cpu`, read from this file, in a clean Debian root, and says what differs. `cuda` has not run.
#
# torch's CPU build lies on an index of PyTorch's own: pass it as --build-arg PIP_EXTRA_INDEX_URL=...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
RUN python3 -m venv /opt/trocar
ENV PATH=/opt/trocar/bin:$PATH SAM2_BUILD_CUDA=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Every package with its version and its hash; what is built from source uses the tools that are locked too.
FROM build AS build-cpu
COPY deploy/requirements-cpu.txt deploy/requirements-source.txt deploy/
RUN pip install --require-hashes --no-deps --only-binary :all: -r deploy/requirements-cpu.txt
RUN pip install --require-hashes --no-deps --no-build-isolation -r deploy/requirements-source.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY engines engines
COPY benchmarks benchmarks
RUN pip install --no-deps --no-build-isolation .

# Not locked: TensorRT's wheels fetch NVIDIA's libraries at install time, from where no lock could be made.
FROM build AS build-cuda
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY engines engines
COPY benchmarks benchmarks
# openvino-telemetry would report to Google Analytics; the locks leave it out too.
RUN PIP_CONSTRAINT=/src/constraints.txt pip install '.[gpu,tracing]' && pip uninstall -y openvino-telemetry

FROM ${PYTHON_IMAGE} AS run
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/trocar trocar
RUN install -d -o trocar -g trocar /var/lib/trocar
# Weights lie in data/trocar/weights, exported engines in cache/trocar/engines: one volume for both. The root
# may be read-only.
ENV PATH=/opt/trocar/bin:$PATH XDG_DATA_HOME=/var/lib/trocar/data XDG_CACHE_HOME=/var/lib/trocar/cache PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
VOLUME /var/lib/trocar
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
# The first start exports the model, which takes a minute.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/readyz', timeout=4)"]
ENTRYPOINT ["trocar", "serve", "--log-format", "json", "--metrics-address", "0.0.0.0:9464"]
# Mount the certificates there, or give other arguments.
CMD ["--address", "0.0.0.0:50051", "--tls-certificate", "/etc/trocar/tls/tls.crt", "--tls-key", "/etc/trocar/tls/tls.key", "--tls-client-ca", "/etc/trocar/tls/ca.crt"]

# With the NVIDIA container toolkit on the host, which brings the driver; the wheels bring the rest.
FROM run AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/trocar /opt/trocar
USER 10001

FROM run AS cpu
COPY --from=build-cpu /opt/trocar /opt/trocar
USER 10001
