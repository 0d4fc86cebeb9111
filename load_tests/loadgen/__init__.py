"""A load generator for any OpenAI-compatible server. It knows nothing of tokenllm but the wire."""
