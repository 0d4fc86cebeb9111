"""tokenllm: an OpenAI-compatible server for large language models in pure Python and Triton."""

__version__ = "0.1.0"
