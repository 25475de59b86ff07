"""`make soak`: `teal serve` on a tiny model, thousands of requests, and its memory while they come.

Prints a table, and with --out writes it as JSON. Exits with 1 where something leaked, failed or was not answered.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import calibrate_once
from soak import Counts, fuzz, soak

from teal_cli.versions import library_versions

_PLATEAU = 1.02
"""Most that the memory of the end may be over that of the middle."""
_LEVELS = [0.0, 0.3, 0.5]


def _resident(pid: int) -> int:
    """Bytes of main memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def _started(home: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The server, loaded, and its port."""
    told = home / "told.json"
    command = [sys.executable, "-m", "teal_cli", "serve", "--model", home / "tiny", "--runs", home / "runs"]
    flags = ["--port", "0", "--device", "cpu", "--sparsity", "0.5,0.3", "--max-new-tokens", "64", "--json", told]
    process = subprocess.Popen([*map(str, command), *map(str, flags)])
    end = time.monotonic() + 300
    while not told.exists():
        if process.poll() is not None or time.monotonic() > end:
            sys.exit("the server did not start")
        time.sleep(0.1)
    return process, int(json.loads(told.read_text())["address"].rpartition(":")[2])


def _left(port: int) -> dict[str, float]:
    """What is in slots and in the queue once nobody asks any more."""
    import http.client

    wanted = ("teal_requests_running", "teal_requests_queued", "teal_cache_positions_used")
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        lines = [line.split() for line in connection.getresponse().read().decode().splitlines()]
        connection.close()
        found = {line[0]: float(line[1]) for line in lines if line[0] in wanted}
        if not any(found.values()) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--fuzzed", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = calibrate_once(Path(folder), chat=True)
        process, port = _started(home)
        try:
            result = _measured(process, port, asked.requests, asked.fuzzed, asked.seed)
        finally:
            process.terminate()
            code = process.wait(120)
    result["exit_code"] = code
    result["wrong"] += [] if code == 0 else [f"the server ended with {code}"]
    for name, value in result.items():
        print(f"{name:28} {value}")
    if asked.out is not None:
        asked.out.write_text(json.dumps({**result, "versions": library_versions()}, indent=2) + "\n")
    sys.exit(1 if result["wrong"] else 0)


def _measured(process: "subprocess.Popen[bytes]", port: int, requests: int, fuzzed: int, seed: int) -> dict:
    memory: list[int] = []
    started = time.monotonic()
    found: Counts = soak(
        port, requests, levels=_LEVELS, seed=seed, every=lambda number: memory.append(_resident(process.pid))
    )
    seconds = time.monotonic() - started
    quarter = max(1, len(memory) // 4)
    plateau, last = statistics.median(memory[2 * quarter : 3 * quarter]), statistics.median(memory[-quarter:])
    left = _left(port)
    anything = fuzz(port, fuzzed, seed=seed)
    left_after = _left(port)
    wrong = found.wrong + anything.wrong
    if last > _PLATEAU * plateau:
        wrong.append(f"memory: {last / plateau:.3f} of the plateau")
    if any(left.values()) or any(left_after.values()):
        wrong.append(f"slots: {left} {left_after}")
    return {
        "requests": requests,
        "asked": dict(found.asked),
        "statuses": {str(status): count for status, count in sorted(found.statuses.items())},
        "seconds": round(seconds, 1),
        "memory_plateau_bytes": plateau,
        "memory_last_over_plateau": round(last / plateau, 4),
        "fuzzed": fuzzed,
        "fuzzed_statuses": {str(status): count for status, count in sorted(anything.statuses.items())},
        "memory_after_fuzz_over_plateau": round(_resident(process.pid) / plateau, 4),
        "left": left_after,
        "wrong": wrong,
    }


if __name__ == "__main__":
    main()
