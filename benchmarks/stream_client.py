"""The client of `serve_streams.py`: streams of completions at once, and when each event came.

    python benchmarks/stream_client.py PORT TOKENS SPARSITY PROMPTS

A process of its own, which takes no time from the server's, and of Python's own modules alone: it is started once for
each measurement.
"""

import http.client
import json
import sys
import threading
import time
from typing import Any


def ask(port: int, tokens: int, prompts: list[list[int]], level: float) -> None:
    """A stream for each prompt, at once; prints of each its usage, and when its events came."""
    found: list[dict[str, Any]] = [{"times": [], "usage": {}} for _ in prompts]

    def one(own: dict[str, Any], prompt: list[int]) -> None:
        asked = {"model": "served", "prompt": prompt, "max_tokens": tokens}
        how = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "sparsity": level}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**asked, **how}), headers)
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event["usage"] is not None:
                    own["usage"] = event["usage"]
                elif event["choices"][0]["text"]:
                    own["times"].append(time.perf_counter())

    threads = [threading.Thread(target=one, args=pair) for pair in zip(found, prompts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def main() -> None:
    """One measurement. Prompts are JSON: a list of tokens for each."""
    port, tokens, level, prompts = sys.argv[1:]
    ask(int(port), int(tokens), json.loads(prompts), float(level))


if __name__ == "__main__":
    main()
