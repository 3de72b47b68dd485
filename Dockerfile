# `llm2clip serve` in a container: docs/serve.md#in-a-container
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:3.12-slim
# Options of pip, such as an index whose torch is for CPUs alone: the default one brings CUDA, several gigabytes.
ARG PIP_OPTIONS=""
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir $PIP_OPTIONS "$(ls /wheel/*.whl)[search]"
RUN useradd --create-home --uid 10001 llm2clip && install --directory --owner=llm2clip /models
USER llm2clip
ENV HF_HOME=/models
VOLUME /models
EXPOSE 8000
# A large model may take minutes to load, during which nothing answers.
HEALTHCHECK --start-period=10m --interval=30s --timeout=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
# Others can reach it, so it wants a token. The model and more options follow.
ENTRYPOINT ["llm2clip", "serve", "--host", "0.0.0.0", "--port", "8000", "--token-env", "LLM2CLIP_TOKEN"]
