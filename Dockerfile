# CPU image of `trocar serve`. Not yet built by us: no Docker engine was at hand (see README).
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY engines engines
COPY benchmarks benchmarks
# The build of sam2 asks for torch too; the constraint keeps it from taking another one.
RUN python -m venv /opt/trocar \
    && SAM2_BUILD_CUDA=0 PIP_CONSTRAINT=/src/constraints.txt /opt/trocar/bin/pip install --no-cache-dir .

FROM python:3.11-slim
RUN useradd --create-home trocar
COPY --from=build /opt/trocar /opt/trocar
USER trocar
ENV PATH=/opt/trocar/bin:$PATH XDG_CACHE_HOME=/home/trocar/.cache
EXPOSE 50051
# TLS comes with a later release; until then the container's network must be trusted.
ENTRYPOINT ["trocar", "serve", "--address", "0.0.0.0:50051", "--insecure"]
