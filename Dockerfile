# An image that runs the quickstart:
#
#   docker build -t everest_ds .
#   docker run --rm --gpus all -v "$PWD/quickstart:/everest_ds/quickstart" everest_ds
#
# Without --gpus all it runs on two CPU processes. Any other command goes after the image's name:
#
#   docker run --rm everest_ds everest doctor
FROM python:3.12-slim

# The compiler is for the small kernels that DeepSpeed and torch.compile build at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/everest PATH=/opt/everest/bin:$PATH PYTHONUNBUFFERED=1
RUN python -m venv "$VIRTUAL_ENV"

WORKDIR /everest_ds
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY everest_ds everest_ds
COPY ds_configs ds_configs
COPY launch launch
COPY docs docs
RUN ["bash", "-c", "caller=$PWD; source launch/environment.sh; ensure_environment ''"]

CMD ["bash", "launch/quickstart.sh"]
