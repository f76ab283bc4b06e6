# Image with the program mixer-jax and the packages in requirements*.txt. Build it in the checkout, for
# CPUs (EXTRA=gcs, which all images have), NVIDIA GPUs (EXTRA=cuda) or TPUs (EXTRA=tpu):
#   docker build --build-arg=EXTRA=cuda --tag=mixer-jax:cuda .
#   docker run --rm --gpus=all --volume="$PWD:/work" --user="$(id --user):$(id --group)" mixer-jax:cuda train --config=digits
FROM python:3.12-slim AS wheel

WORKDIR /source
COPY LICENSE NOTICE README.md pyproject.toml setup.py ./
COPY configs configs
COPY mixer_jax mixer_jax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/wheel .

FROM python:3.12-slim

ARG EXTRA=gcs
WORKDIR /requirements
COPY requirements.txt requirements-cuda.txt requirements-gcs.txt requirements-tpu.txt ./
RUN pip install --no-cache-dir --requirement=requirements.txt --requirement=requirements-gcs.txt \
    --requirement="requirements-${EXTRA}.txt" \
  && useradd --create-home --uid=1000 mixer \
  # Any user may run the image, so that files in volumes belong to that user.
  && chmod 1777 /home/mixer
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl

# Python finds the name of a user who is not in /etc/passwd in USER. GKE mounts NVIDIA's driver into
# that folder.
ENV HOME=/home/mixer USER=mixer PYTHONUNBUFFERED=1 LD_LIBRARY_PATH=/usr/local/nvidia/lib64
WORKDIR /work
RUN chmod 1777 /work
# A number, so that Kubernetes can verify that the user is not root.
USER 1000
ENTRYPOINT ["mixer-jax"]
CMD ["--help"]
