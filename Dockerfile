# The image of `ema serve` on the CPU, with the commands that read. It does not need BuildKit.
#   BASE_IMAGE     an image with Python 3.11 or newer, pip and venv
#   TORCH_VERSION  the torch release
#   TORCH_INDEX    the index with torch's CPU build; empty: pip's default
#   EXTRAS         `server`; `fast` adds the compiled kernel (210 MB); `demo` adds the demo's trainer and evaluator
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS wheel
COPY . /src
RUN pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --no-create-home --home-dir /tmp ema \
 && install --directory --owner=10001 --group=10001 /data \
 && install --directory --owner=10001 --group=10001 --mode=0700 /run/ema

# torch first: this layer is reused when the project changes. Headers and tests are removed.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv --without-pip /opt/ema \
 && pip --python /opt/ema/bin/python install --quiet --no-cache-dir \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$TORCH_VERSION" \
 && cd /opt/ema/lib/python3*/site-packages/torch \
 && rm -rf include test \
 && find bin -type f ! -name torch_shm_manager -delete \
 && find /opt/ema -type d -name tests -prune -exec rm -r {} +

ARG EXTRAS=server
COPY --from=wheel /wheel /wheel
RUN pip --python /opt/ema/bin/python install --quiet --no-cache-dir "$(echo /wheel/*.whl)[$EXTRAS]"

ENV PATH=/opt/ema/bin:$PATH \
    EMA_ZMQ=tcp://0.0.0.0:5555 \
    EMA_HTTP=0.0.0.0:8080 \
    EMA_DATA=/data \
    EMA_SHM_FOLDER=/run/ema
EXPOSE 5555 8080
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["ema"]
CMD ["serve"]
