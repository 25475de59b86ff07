"""Run `teal bench --speculate` on a CPU, and note the command, the load of the machine and the clock.

python benchmarks/speculation_cpu.py [--cpu-time] --out benchmarks/results/speculation-smollm2-135m-cpu.json -- \\
    --model smollm2-135m --dtype float32 --threads 2 --speculate int8,lookup+int8 --repeats 3

`--cpu-time` measures by the processor time of the process, with one thread: on a machine that others use, what they
take is left out, but for the caches and the memory that all share.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from teal_cli.cli import run
from teal_cli.writing import check_file


def main() -> None:
    """One result, which is that of the verb with three more keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("flags", nargs="+", help="of teal bench, behind --")
    arguments = parser.parse_args()
    check_file(arguments.out)
    flags = list(arguments.flags)
    if arguments.cpu_time:
        flags += ["--threads", "1"]
        time.perf_counter = time.process_time
    before = os.getloadavg()[0]
    code = run(["bench", *flags, "--device", "cpu", "--json", str(arguments.out)])
    if code:
        raise SystemExit(code)
    result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result["command"] = shlex.join(["python", "benchmarks/speculation_cpu.py", *sys.argv[1:]])
    result["clock"] = "processor time, one thread" if arguments.cpu_time else "wall"
    result["load"] = {"before": before, "after": os.getloadavg()[0], "processors": os.cpu_count()}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
