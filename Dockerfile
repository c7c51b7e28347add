# The demo or the server on a CPU: docs/container.md. Weights are mounted at /weights, never copied into the image.
FROM python:3.11-slim
WORKDIR /app
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1
COPY requirements.txt ./
# torch as the lock says, from an index that has it without a GPU's libraries; then the rest but the project
ARG TORCH_INDEX
RUN ${TORCH_INDEX:+env PIP_INDEX_URL=$TORCH_INDEX} pip install "$(grep ^torch== requirements.txt)"
RUN grep -v '^-e' requirements.txt > locked.txt && pip install -r locked.txt
COPY . .
RUN useradd --create-home --uid 10001 minimind
USER minimind
EXPOSE 8501 8000
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=5)"]
CMD ["streamlit", "run", "web_demo.py", "--server.address", "0.0.0.0", "--", "/weights"]
