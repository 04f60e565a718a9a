# One image, two commands: `loraplex serve` (the default) and `loraplex trainer`. Builds with the classic builder too.

FROM python:3.11-slim-bookworm AS build

# One more index, for torch: the default one serves Linux a CUDA build of several GB. Empty means no extra index.
ARG TORCH_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /src
COPY requirements.lock ./
# Gone afterwards, as nothing imports it at run time: C++ headers, torch's CMake files, test programs and protoc, and the
# packages' own tests. pip compiles what it installs, so that a read-only image starts as fast as a writable one.
RUN pip install -q ${TORCH_EXTRA_INDEX_URL:+--extra-index-url "$TORCH_EXTRA_INDEX_URL"} -r requirements.lock \
    && cd /opt/venv/lib/python3.11/site-packages \
    && find . -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
    && rm -rf torch/include torch/share pyarrow/include \
    && find torch/bin -mindepth 1 ! -name torch_shm_manager -delete \
    && find . -name '*.a' -delete

# The extras of pyproject.toml, separated by commas: these two are for several machines, and need 30 MB. Empty means none.
ARG EXTRAS=postgres,s3
COPY pyproject.toml requirements-dev.lock ./
RUN python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
        print(*(package for name in sys.argv[1].split(",") if name for package in extras[name]), sep="\n")' "$EXTRAS" > extras.txt \
    && sed 's/\[.*\]//' requirements.lock requirements-dev.lock > constraints.txt \
    && pip install -q -c constraints.txt -r extras.txt

# Apart from the dependencies, so that a change to the project is a layer of its own, of a few hundred KB.
COPY README.md LICENSE ./
COPY adapters adapters
COPY app app
COPY client client
RUN pip install -q --no-deps --no-build-isolation --prefix /opt/project . ./client \
    && pip uninstall -q -y flit-core setuptools pip


FROM python:3.11-slim-bookworm

# A fixed number, so that a volume's files keep their owner and an orchestrator can see that it is not root.
RUN groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin loraplex \
    && install -d -o loraplex -g loraplex -m 0750 /data

COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/project /opt/venv

# /data is the only place that is written: the root file system may be read-only, and a library's temporary files go
# there too.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LORAPLEX_DATA_DIR=/data \
    TMPDIR=/data
VOLUME /data
WORKDIR /data
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["loraplex"]
CMD ["serve"]
