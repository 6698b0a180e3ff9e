# An image with WanDistiller and what it needs. torch comes from the package index with its CUDA libraries; the host brings the driver
# (NVIDIA Container Toolkit). g++ is what --compile calls.
#
#   docker build -t wandistiller .
#   docker run --gpus all --ipc host -v "$PWD/models:/models:ro" -v "$PWD/outputs:/wandistiller/outputs" -v hub:/root/.cache/huggingface \
#       wandistiller train --preset 1.3B-0.5B-24GB --teacher_path /models/Wan2.1-T2V-1.3B --output_dir outputs/mine
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /wandistiller
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt gguf pyarrow
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
ENTRYPOINT ["wandistiller"]
CMD ["--help"]
