"""The last lines of a start: where the server is, and two ways to talk to it that work when pasted."""

import ipaddress
import json
import shlex

from tokenllm.config import ServeConfig
from tokenllm.control import ModelReady

KEY_PLACEHOLDER = "YOUR_API_KEY"


def greeting(config: ServeConfig, port: int, model: str, ready: ModelReady) -> str:
    url = f"http://{_reachable(config.host)}:{port}/v1"
    has_key = bool(config.api_key or config.api_key_file)
    return f"""
{model} is ready: {ready.kv_tokens_capacity} token slots, context of {ready.max_model_len} tokens.

{_curl(url, model, has_key)}

{_python(url, model, has_key)}

tokenllm serves at {url}"""


def _curl(url: str, model: str, has_key: bool) -> str:
    body = json.dumps({"model": model, "max_tokens": 60, "messages": [{"role": "user", "content": "Say hello."}]})
    key = f" -H 'Authorization: Bearer {KEY_PLACEHOLDER}'" if has_key else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _python(url: str, model: str, has_key: bool) -> str:
    return f"""from openai import OpenAI
client = OpenAI(base_url={json.dumps(url)}, api_key={json.dumps(KEY_PLACEHOLDER if has_key else "none")})
messages = [{{"role": "user", "content": "Say hello."}}]
answer = client.chat.completions.create(model={json.dumps(model)}, messages=messages, max_tokens=60)
print(answer.choices[0].message.content)"""


def _reachable(host: str) -> str:
    """An address that clients on this machine can use: one that means all addresses is not one of them."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"
