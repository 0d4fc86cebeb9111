"""llama.cpp's own HTTP server, as the PyPI wheel `xllamacpp` carries it, in a process of its own.

Continuous batching is on and the prompt cache off, so that every prompt is computed.
"""

import argparse
import signal

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True, help="requests in one batch")
    parser.add_argument("--stream-tokens", type=int, required=True, help="longest prompt plus answer")
    arguments = parser.parse_args()
    server = xllamacpp.Server(parameters(arguments))
    print(f"{server.listening_address} {xllamacpp.get_system_info()}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def parameters(arguments: argparse.Namespace) -> xllamacpp.CommonParams:
    chosen = xllamacpp.CommonParams()
    chosen.model.path = arguments.model
    chosen.port = arguments.port
    chosen.cpuparams.n_threads = chosen.cpuparams_batch.n_threads = arguments.threads
    chosen.n_parallel = arguments.streams
    chosen.n_ctx = arguments.streams * arguments.stream_tokens
    chosen.cont_batching = True
    chosen.cache_prompt = False
    chosen.cache_ram_mib = 0
    return chosen


if __name__ == "__main__":
    main()
