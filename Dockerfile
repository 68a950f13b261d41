# syntax=docker/dockerfile:1
#
#   docker build -t sdxl-worker .                     checkpoint and LoRAs come at the first cold start
#   docker build -t sdxl-worker --build-arg BAKE_MODELS=1 \
#       --secret id=civitai,env=CIVITAI_API_KEY .     they lie in the image: 8.5 GB more to push and pull

ARG BAKE_MODELS=0

# ----------------------------------------------------------------------------------------------------------------------
# worker: everything that outlives a change of the code

FROM runpod/base:0.6.3-cuda11.8.0 AS worker

# The base image holds Pythons 3.8 to 3.13. "uv --system" takes the first on PATH, and /usr/local/bin comes first.
RUN ln -sf /usr/bin/python3.11 /usr/local/bin/python && ln -sf /usr/bin/python3.11 /usr/local/bin/python3

# RunPod mounts the network volume over /runpod-volume and so hides whatever the build wrote there. The base image keeps
# the Hugging Face caches below it.
ENV HF_HOME=/opt/huggingface \
    HUGGINGFACE_HUB_CACHE=/opt/huggingface/hub
WORKDIR /worker

# PEP 440 ranks 2.6.0+cu118 above 2.6.0: torch==2.6.* is the CUDA 11.8 build once PyTorch's index is searched as well.
# That index also holds old copies of requests, pillow and more, and uv stops at the first index that knows a name:
# unsafe-best-match makes it compare the versions of both.
# Unlike pip, uv leaves it to the first import to compile each module: 12 s more of every new container's cold start.
COPY requirements.txt ./
RUN uv pip install --system --no-cache-dir --compile-bytecode --index-strategy unsafe-best-match \
        --extra-index-url https://download.pytorch.org/whl/cu118 -r requirements.txt \
    && python -c "import torch; assert torch.version.cuda == '11.8', f'not the CUDA 11.8 build: {torch.__version__}'"

# With these two folders a cold start asks nothing of the hub.
RUN hf download stabilityai/stable-diffusion-xl-base-1.0 --revision 462165984030d82259a11f4367a4eed129e94a7b \
        --include "*.json" "*.txt" --local-dir /opt/stable-diffusion-xl-base-1.0 \
    && hf download madebyollin/sdxl-vae-fp16-fix --revision 207b116dae70ace3637169f1ddd2434b91b3a8cd \
        --include config.json diffusion_pytorch_model.safetensors --local-dir /opt/sdxl-vae-fp16-fix \
    && rm -rf "$HF_HOME"

# The SDK's own default is DEBUG, which prints whole jobs. A cold start that downloads may outlast RunPod's 7 minutes.
ENV SDXL_CONFIG=/opt/stable-diffusion-xl-base-1.0 \
    VAE_MODEL=/opt/sdxl-vae-fp16-fix \
    RUNPOD_LOG_LEVEL=INFO \
    RUNPOD_INIT_TIMEOUT=1800 \
    PYTHONUNBUFFERED=1

# ----------------------------------------------------------------------------------------------------------------------
# models, for BAKE_MODELS=1 alone. A change of handler.py runs this step again, but the cache mount still has the files,
# and COPY --from goes by their contents: the image's 8.5 GB layer stays the one that is already pushed.
# The key is a file that this one command sees; no layer, build argument or history entry holds it.
# A layer keeps whole seconds of a file's time. The second setup_models() notes the times as they will be: otherwise
# every cold start would take the files for touched and hash them again.

FROM worker AS models
COPY handler.py ./
RUN --mount=type=secret,id=civitai,required=true --mount=type=cache,id=sdxl-models,target=/cache \
    CIVITAI_API_KEY="$(cat /run/secrets/civitai)" MODEL_CACHE_DIR=/cache \
    python -c "import handler as h; h.configure_logging(); assert len(h.setup_models()[1]) == len(h.LORA_CONFIGS)" \
    && cp -r /cache /models && find /models -type f -exec touch -d 2000-01-01 {} + \
    && MODEL_CACHE_DIR=/models python -c "import handler; handler.setup_models()"

FROM worker AS worker-1
COPY --from=models /models /models
ENV MODEL_CACHE_DIR=/models

FROM worker AS worker-0

# ----------------------------------------------------------------------------------------------------------------------
# the image: the code is its last layer

# hadolint ignore=DL3006
FROM worker-${BAKE_MODELS}
COPY handler.py test_input.json /worker/
# The exec form makes Python process 1, so that RunPod's SIGTERM reaches the SDK, which lets the running job finish.
CMD ["python", "-u", "/worker/handler.py"]
